// What calls know of a cell: its weights and states. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "arrays.h"
#include "bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/machine/plan.h"

namespace fusedrnn {
namespace {

CellId cell_of(int id) {
  if (id < 0 || id >= cpu::kCells)
    throw py::value_error("cell: expected 0 to " + std::to_string(cpu::kCells - 1) + ", got " + std::to_string(id));
  return CellId(id);
}

// A cell, compiled or a program: what calls check.
struct PyCell {
  struct Weight {
    const char* name;
    Index blocks;  // of H rows
    bool optional;
  };
  CellId id{};
  std::optional<cpu::MachinePlan> plan;  // none: compiled
  Index gates;                           // blocks of weight_ih
  int states, scalars = 0;
  bool projects;
  std::vector<Weight> weights;  // in a call's order (api.h)

  explicit PyCell(CellId id_) : id(id_) {
    const cpu::CellShape& shape = cpu::kernels<float>().cells[int(id)].shape;
    gates = shape.gates, states = 1 + shape.has_c, projects = shape.projects;
    add_plain({gates, gates, gates, gates});
    if (shape.layer_norm) add("gain_ih", gates), add("gain_hh", gates);
    if (shape.layer_norm && shape.has_c) add("gain_c", 1), add("bias_c", 1);
    if (projects) add("weight_hr", 1);
  }
  explicit PyCell(cpu::MachinePlan plan_)
      : plan(std::move(plan_)),
        gates(plan->blocks[cpu::MachinePlan::weight_ih]),
        states(plan->states),
        scalars(plan->scalars),
        projects(plan->projects) {
    add_plain({gates, plan->blocks[1], plan->blocks[2], plan->blocks[3]});
    for (const int blocks : plan->parameters) add("parameter", blocks);
    if (projects) add("weight_hr", 1);
  }

  Cell core() const { return {id, plan ? &*plan : nullptr}; }
  void need_compiled() const {
    if (plan) throw RefusedValue("cell: expected a compiled one, got a program");
  }
  // Whether weights that are packed for one are packed for the other.
  bool same_weights(const PyCell& other) const {
    if (!plan || !other.plan) return !plan && !other.plan && id == other.id;
    return plan->same_weights(*other.plan);
  }

 private:
  // What has no rows may be missing.
  void add(const char* name, Index blocks, bool optional = false) {
    weights.push_back({name, blocks, optional || !blocks});
  }
  void add_plain(Shape blocks) {
    const Index* b = blocks.begin();
    add("weight_ih", b[0]), add("weight_hh", b[1]), add("bias_ih", b[2], true), add("bias_hh", b[3], true);
  }
};
using CellPtr = std::shared_ptr<const PyCell>;

// numbers: int32 (n,), as fusedrnn.cells.program writes them; start and constants: lists of numbers.
std::shared_ptr<PyCell> py_machine_plan(const py::object& numbers, std::vector<double> start,
                                        std::vector<double> constants) {
  const View a = array_view(numbers, "numbers");
  if (a.ndim != 1) throw RefusedValue("numbers: expected one axis, got " + a.text());
  const std::int32_t* data = need<std::int32_t>(numbers, "numbers", {a.shape[0]});
  try {
    return std::make_shared<PyCell>(
        cpu::MachinePlan(data, std::size_t(a.shape[0]), std::move(start), std::move(constants)));
  } catch (const std::invalid_argument& error) {
    throw RefusedValue(error.what());
  }
}

py::object entry(const py::tuple& all, std::size_t k) {
  return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(all.ptr(), Py_ssize_t(k)));
}
py::object& entry(std::vector<py::object>& all, std::size_t k) { return all[k]; }

void need_count(std::size_t got, const char* name, std::size_t count) {
  if (got != count)
    throw RefusedValue(std::string(name) + ": expected " + std::to_string(count) + " entries, got " +
                       std::to_string(got));
}

// then(number, entry, columns) for each state; `all` may be empty.
template <class Entries, class Then>
void each_state(const PyCell& cell, const Sizes& n, Entries& all, const char* name, Then&& then) {
  if (all.size() == 0) return;
  need_count(all.size(), name, std::size_t(cell.states));
  for (std::size_t s = 0; s < all.size(); ++s) then(s, entry(all, s), s ? n.H : n.P);
}

// then(number, shape) for each weight.
template <class Then>
void each_weight(const PyCell& cell, const Sizes& n, Then&& then) {
  const std::size_t vectors = cell.weights.size() - cell.projects;
  then(0, {cell.weights[0].blocks * n.H, n.I});
  then(1, {cell.weights[1].blocks * n.H, n.P});
  for (std::size_t k = 2; k < vectors; ++k) then(k, {cell.weights[k].blocks * n.H});
  if (cell.projects) then(vectors, {n.P, n.H});
}

// I, H and P, by weight_ih and the rows of weight_hr.
Sizes sizes_of(const PyCell& cell, const py::tuple& weights) {
  need_count(weights.size(), "weights", cell.weights.size());
  const View a = array_view(entry(weights, 0), "weight_ih");
  if (a.ndim != 2 || a.shape[0] < cell.gates || a.shape[1] == 0)
    throw RefusedValue("weight_ih: expected (G*H, I), H and I at least 1, got " + a.text());
  const Index I = a.shape[1], H = a.shape[0] / cell.gates;
  if (!cell.projects) return {0, 0, I, H, H};
  const View r = array_view(entry(weights, weights.size() - 1), "weight_hr");
  if (r.ndim != 2 || r.shape[0] < 1 || r.shape[0] > H)
    throw RefusedValue("weight_hr: expected (P, H), P from 1 to H = " + std::to_string(H) + ", got " + r.text());
  return {0, 0, I, H, r.shape[0]};
}

template <class T>
Weights<const T> weights_of(Arrays<T>& arrays, const PyCell& cell, const py::tuple& given, const Sizes& n) {
  Weights<const T> found(given.size());
  each_weight(cell, n, [&](std::size_t k, Shape shape) {
    const py::object w = entry(given, k);
    const PyCell::Weight& of = cell.weights[k];
    if (!of.optional || !w.is_none())
      found[k] = shape.size() == 2 ? arrays.matrix(w, of.name, shape) : arrays.need(w, of.name, shape);
  });
  return found;
}

}  // namespace
}  // namespace fusedrnn
