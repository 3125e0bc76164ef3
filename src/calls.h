// Calls of the kernels: arguments checked, outputs made, the call run without the GIL. SPDX-License-Identifier:
// Apache-2.0
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cells.h"

namespace fusedrnn {
namespace {

// The hook runs Python's signal handlers; a handler that raises stops the call.
Poll signals() {
  return {[](void*) {
            const py::gil_scoped_acquire gil;
            return PyErr_CheckSignals() == 0;
          },
          nullptr};
}

template <class F>
auto without_gil(F&& f) {
  try {
    const py::gil_scoped_release release;
    return f();
  } catch (const Interrupted&) {
    throw py::error_already_set();
  }
}

// A pointer for each dtype, of which a call's own is set: get(T()) and slot(T()) are that of T.
template <template <class> class Ptr>
struct OfDtype {
  Ptr<float> f32;
  Ptr<double> f64;
  const auto* get(float) const { return f32.get(); }
  const auto* get(double) const { return f64.get(); }
  Ptr<float>& slot(float) { return f32; }
  Ptr<double>& slot(double) { return f64; }
};

struct PyPacked : OfDtype<PackedPtr> {
  CellPtr cell;
  Sizes sizes;  // of weights: no T and B
  bool bfloat16;
  py::tuple weights;
};

// A problem with copies of its lengths and resets: what backward walks by must be what forward walked by, whatever
// becomes of the caller's.
struct OwnProblem {
  Problem problem;
  std::vector<Index> lengths;
  std::vector<unsigned char> reset;
};

// What both directions read. x of a sequence is (T, B, I), of one step (B, I); the others have entries of arrays.
struct Inputs {
  py::object x;
  py::tuple state0, scalars;
};

struct PyTape : OfDtype<TapePtr>, OwnProblem {
  CellPtr cell;
  Inputs inputs;
  py::tuple weights;
  py::object y;
  bool step = false;               // or a sequence
  py::object packed = py::none();  // kept for boundary states only, which run forward again
};

py::tuple sizes_of(const PyTape& tape) {
  const Sizes& n = tape.problem.sizes;
  return py::make_tuple(n.T, n.B, n.I, n.H, n.P);
}

// --- problems --------------------------------------------------------------------------------------------------------

// fusedrnn.backends.protocol.Regularization: the rates, the seed (None: evaluation) and the stream; or None.
using PyRegularization = std::optional<std::tuple<double, double, double, std::optional<std::uint64_t>, std::uint32_t>>;

// A program may only read masks that there are.
Regularization regularization_of(const PyRegularization& given, const PyCell& cell) {
  Regularization r;
  if (given) {
    const auto& [recurrent_dropout, zoneout_h, zoneout_c, seed, stream] = *given;
    for (const double rate : {recurrent_dropout, zoneout_h, zoneout_c})
      if (!(rate >= 0 && rate <= 1))
        throw RefusedValue("regularization: expected rates from 0 to 1, got " + std::to_string(rate));
    if (zoneout_c > 0 && !cell.plan && cell.states < 2)
      throw RefusedValue("zoneout_c: expected 0 for a cell without c");
    r = {recurrent_dropout, zoneout_h, zoneout_c, seed.has_value(), seed.value_or(0), stream};
  }
  const bool there[] = {r.drops(), r.zoneout_h > 0, r.zoneout_c > 0};
  for (int k = 0; cell.plan && k < 3; ++k)
    if (cell.plan->reads_masks[k] && !there[k]) throw RefusedValue("cell: expected one without this mask");
  return r;
}

void set_rows(OwnProblem& owner, const py::object& lengths, const py::object& reset) {
  const Index time = owner.problem.sizes.T, B = owner.problem.sizes.B;
  if (!lengths.is_none()) {
    const Index* data = need<Index>(lengths, "lengths", {B});
    owner.lengths.assign(data, data + B);
    for (Index n : owner.lengths)
      if (n < 0 || n > time)
        throw RefusedValue("lengths: expected 0 to T = " + std::to_string(time) + ", got " + std::to_string(n));
    owner.problem.lengths = owner.lengths.data();
  }
  if (!reset.is_none()) {
    const bool* data = need<bool>(reset, "reset", {time, B});
    owner.reset.assign(data, data + time * B);
    for (unsigned char& r : owner.reset) r = r != 0;
    owner.problem.reset = owner.reset.data();
  }
}

void check_bfloat16(const PyCell& cell, bool bfloat16) {
  if (bfloat16 && !has_bfloat16()) throw RefusedValue("bfloat16: expected False on this processor, got True");
  if (bfloat16 && cell.plan) throw RefusedValue("bfloat16: expected False for a program, got True");
}

// What a call is, apart from its arrays over time.
struct Options {
  const py::object &lengths, &reset;
  bool reverse = false;
  Index detach_every = 0;
  const PyRegularization& regularization;
  bool bfloat16 = false;
};

const Problem& problem_of(OwnProblem& owner, const PyCell& cell, const Sizes& sizes, const Options& options) {
  check_bfloat16(cell, options.bfloat16);
  owner.problem = {cell.core(),
                   sizes,
                   nullptr,
                   nullptr,
                   options.reverse,
                   options.detach_every,
                   regularization_of(options.regularization, cell),
                   options.bfloat16};
  if (options.detach_every < 0)
    throw RefusedValue("detach_every: expected 1 or more, or none, got " + std::to_string(options.detach_every));
  set_rows(owner, options.lengths, options.reset);
  return owner.problem;
}

// Whether an array of so many axes is float32; so are copies of those of a call in bfloat16 (bfloat16.h), which are
// given as int16: that is checked where they are read.
bool is_float32(const py::object& o, const char* name, int ndim, bool bfloat16 = false) {
  const View a = array_view(o, name);
  if (a.ndim != ndim)
    throw RefusedValue(std::string(name) + ": expected " + std::to_string(ndim) + " axes, got " + a.text());
  if (bfloat16 || a.is<float>()) return true;
  if (a.is<double>()) return false;
  throw RefusedType(std::string(name) + ": expected float32 or float64, got " + a.text());
}

Save save_of(int id) {
  if (id < 0 || id > 2)
    throw py::value_error("save: expected 0 (nothing), 1 (all) or 2 (boundary states), got " + std::to_string(id));
  return Save(id);
}

// --- packed weights --------------------------------------------------------------------------------------------------

template <class T>
std::unique_ptr<PyPacked> pack_as(const CellPtr& cell, const Sizes& n, const py::tuple& given, bool bfloat16) {
  auto packed = std::make_unique<PyPacked>();
  packed->cell = cell, packed->sizes = n, packed->bfloat16 = bfloat16, packed->weights = given;
  Arrays<T> arrays(bfloat16);
  const Weights<const T> weights = weights_of<T>(arrays, *cell, given, n);
  packed->slot(T()) = without_gil([&] {
    arrays.widen();
    return pack<T>(cell->core(), n.I, n.H, n.P, weights, signals(), bfloat16);
  });
  return packed;
}

std::unique_ptr<PyPacked> py_pack(const CellPtr& cell, const py::tuple& weights, bool bfloat16) {
  check_bfloat16(*cell, bfloat16);
  const Sizes sizes = sizes_of(*cell, weights);
  const bool f32 = is_float32(entry(weights, 0), "weight_ih", 2, bfloat16);
  return (f32 ? pack_as<float> : pack_as<double>)(cell, sizes, weights, bfloat16);
}

// Packed weights, or as they are.
struct Given {
  const PyPacked* packed = nullptr;
  py::tuple weights;
  Sizes sizes;
  bool f32;

  explicit Given(const PyPacked& of) : packed(&of), sizes(of.sizes), f32(of.f32 != nullptr) {}
  Given(const PyCell& cell, const py::object& o, bool bfloat16) {
    if (py::isinstance<PyPacked>(o)) {
      *this = Given(o.cast<const PyPacked&>());
      return;
    }
    if (!PyTuple_CheckExact(o.ptr())) throw py::type_error("weights: expected a tuple, or packed ones");
    weights = py::reinterpret_borrow<py::tuple>(o);
    sizes = sizes_of(cell, weights);
    f32 = is_float32(entry(weights, 0), "weight_ih", 2, bfloat16);
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

Sizes with_time(Sizes sizes, const py::object& x) {
  const View a = array_view(x, "x");
  if (a.ndim != 2 && a.ndim != 3) throw RefusedValue("x: expected 2 or 3 axes, got " + a.text());
  sizes.T = a.ndim == 2 ? 1 : a.shape[0], sizes.B = a.shape[a.ndim - 2];
  return sizes;
}
bool is_step(const py::object& x) { return array_view(x, "x").ndim == 2; }

// What is of x's kind: a sequence over time, or a step.
template <class T>
Sequence<const T> over_time(Arrays<T>& arrays, const py::object& o, const char* name, bool step, const Sizes& n,
                            Index width) {
  return step ? arrays.sequence(o, name, {n.B, width}) : arrays.sequence(o, name, {n.T, n.B, width});
}

template <class Call, class T>
void read_inputs(Call& call, Arrays<T>& arrays, const PyCell& cell, const Inputs& in, bool step) {
  const Sizes& n = call.problem.sizes;
  call.x = over_time(arrays, in.x, "x", step, n, n.I);
  need_count(in.scalars.size(), "scalars", std::size_t(cell.scalars));
  for (std::size_t k = 0; k < in.scalars.size(); ++k)
    call.scalars.push_back(arrays.need(entry(in.scalars, k), "scalars", {n.T, n.B}));
  each_state(cell, n, in.state0, "state0", [&](std::size_t s, const py::object& o, Index width) {
    call.state0[s] = arrays.need(o, "state0", {n.B, width});
  });
}

// Outputs of forward: null before they are made. y is None of one step that is not a sequence; there may be no states.
struct Outputs {
  py::object y;
  std::vector<py::object> stateT, states;
};

// One forward call: checked, its outputs allocated, nothing run yet.
template <class T>
struct ForwardSetup {
  ForwardCall<T> call{};
  std::unique_ptr<PyTape> tape = std::make_unique<PyTape>();  // owns the lengths and resets that `call` points to
  Arrays<T> arrays;
  Outputs out;

  ForwardSetup(const PyCell& cell, const Given& given, const Inputs& in, const Options& options, Outputs outputs)
      : arrays(options.bfloat16), out(std::move(outputs)) {
    const bool step = is_step(in.x);
    const Sizes n = problem_of(*tape, cell, with_time(given.sizes, in.x), options).sizes;
    call.problem = tape->problem;
    if (const PyPacked* const packed = given.packed) {
      if (!cell.same_weights(*packed->cell)) throw RefusedValue("cell: expected that of the packed weights");
      call.packed = packed->get(T());
      if (!call.packed || packed->bfloat16 != options.bfloat16)
        throw RefusedType("x: expected the dtype of the weights");
    } else {
      call.weights = weights_of(arrays, cell, given.weights, n);
    }
    read_inputs(call, arrays, cell, in, step);
    call.poll = signals();
    if (!step) call.y = arrays.output(out.y, "y", {n.T, n.B, n.P});
    need_count(out.stateT.size(), "stateT", std::size_t(cell.states));
    each_state(cell, n, out.stateT, "stateT", [&](std::size_t s, py::object& o, Index width) {
      call.stateT[s] = arrays.output(o, "stateT", {n.B, width});
      if (o.is_none()) throw RefusedType("stateT: expected arrays, got None");
    });
    if (step) call.y = call.stateT[0];
    if (!step && out.y.is_none()) throw RefusedType("y: expected an array, got None");
    each_state(cell, n, out.states, "states", [&](std::size_t s, py::object& o, Index width) {
      call.states[s] = arrays.output(o, "states", {n.T, n.B, width});
    });
  }

  TapePtr<T> run() const {
    return without_gil([&] {
      arrays.widen();
      TapePtr<T> made = forward<T>(call);
      arrays.round();
      return made;
    });
  }
};

py::tuple tuple_of(const std::vector<py::object>& all) {
  py::tuple made(all.size());
  for (std::size_t k = 0; k < all.size(); ++k) made[k] = all[k];
  return made;
}

// As many to be made as there are states, where they are wanted.
std::vector<py::object> new_states(const PyCell& cell, bool wanted) {
  return std::vector<py::object>(std::size_t(wanted ? cell.states : 0));
}

template <class T>
py::tuple forward_as(const py::object& packed_object, const CellPtr& cell, const Inputs& in, const Options& options,
                     bool return_states, Save save) {
  const PyPacked& packed = packed_object.cast<const PyPacked&>();
  ForwardSetup<T> setup(*cell, Given(packed), in, options,
                        {{}, new_states(*cell, true), new_states(*cell, return_states)});
  setup.call.save = save;
  setup.tape->slot(T()) = setup.run();
  const Outputs& out = setup.out;
  py::object kept = py::none();
  if (save != Save::nothing) {
    PyTape& tape = *setup.tape;
    if (save == Save::boundary_states) tape.packed = packed_object;
    tape.cell = cell, tape.inputs = in, tape.weights = packed.weights, tape.y = out.y;
    kept = py::cast(std::move(setup.tape));
  }
  return py::make_tuple(out.y, tuple_of(out.stateT),
                        return_states ? py::object(tuple_of(out.states)) : py::object(py::none()), kept);
}

// `cell`: None for the one that was packed; of a program whose call is regularized, another one.
py::tuple py_forward(const py::object& packed, const py::object& cell, const py::object& x, const py::tuple& state0,
                     const py::tuple& scalars, const py::object& lengths, const py::object& reset, bool reverse,
                     Index detach_every, const PyRegularization& regularization, bool return_states, int save_id) {
  if (!py::isinstance<PyPacked>(packed))
    throw py::type_error("packed: expected what pack returned, got " + type_name(packed));
  if (!cell.is_none() && !py::isinstance<PyCell>(cell))
    throw py::type_error("cell: expected a Cell or None, got " + type_name(cell));
  const PyPacked& given = packed.cast<const PyPacked&>();
  const Options options = {lengths, reset, reverse, detach_every, regularization, given.bfloat16};
  return (is_float32(x, "x", 3, given.bfloat16)
              ? forward_as<float>
              : forward_as<double>)(packed, cell.is_none() ? given.cell : cell.cast<CellPtr>(), {x, state0, scalars},
                                    options, return_states, save_of(save_id));
}

// The memory of a tape in an array (rows, width): those rows that there are, or more.
template <class T>
T* tape_memory(const py::object& o, const Problem& problem, Save save) {
  const View a = array_view(o, "tape");
  const TapeShape shape = tape_shape<T>(problem, save);
  const Index rows = a.ndim == 2 ? std::max(a.shape[0], shape.rows) : shape.rows;
  need_writeable(o, "tape");
  return const_cast<T*>(need<T>(o, "tape", {rows, shape.width}));
}

// Forward of weights as they are now, or packed, with nothing kept: all that backward needs is in arrays of the
// caller's. `saved` is None where nothing is saved.
template <class T>
void run_forward_as(const PyCell& cell, const Given& given, const Inputs& in, const Options& options, bool recompute,
                    Outputs out, const py::object& saved) {
  ForwardSetup<T> setup(cell, given, in, options, std::move(out));
  if (!saved.is_none()) {
    ForwardCall<T>& call = setup.call;
    call.save = recompute ? Save::boundary_states : Save::all;
    call.saved = tape_memory<T>(saved, call.problem, call.save);
    // What ragged rows leave of it is 0, so that it is the same for the same inputs.
    const TapeShape shape = tape_shape<T>(call.problem, call.save);
    const Index kept = call.problem.lengths && (cell.plan || recompute) ? 0 : shape.rows;
    std::fill(call.saved + kept * shape.width, call.saved + array_view(saved, "tape").shape[0] * shape.width, T(0));
  }
  setup.run();
}

void py_run_forward(const PyCell& cell, const py::object& weights, const py::object& x, const py::tuple& state0,
                    const py::tuple& scalars, const py::object& lengths, const py::object& reset, bool reverse,
                    Index detach_every, const PyRegularization& regularization, bool recompute, const py::object& y,
                    const std::vector<py::object>& stateT, const std::vector<py::object>& states,
                    const py::object& tape, bool bfloat16) {
  const Given given(cell, weights, bfloat16);
  (given.f32 ? run_forward_as<float>
             : run_forward_as<double>)(cell, given, {x, state0, scalars},
                                       {lengths, reset, reverse, detach_every, regularization, bfloat16}, recompute,
                                       {y, stateT, states}, tape);
}

// --- backward --------------------------------------------------------------------------------------------------------

struct Upstream {
  const py::object& dy;
  const py::tuple &dstateT, &dstates;
};

// null before they are made, None where not wanted.
struct Gradients {
  py::object dx;
  std::vector<py::object> dweights, dstate0, dscalars;
};

// One backward call: checked, its outputs allocated, nothing run yet.
template <class T>
struct BackwardSetup {
  BackwardCall<T> call{};
  Arrays<T> arrays;
  Gradients out;

  BackwardSetup(const PyTape& tape, const Tape<T>* core, const Upstream& upstream, Gradients gradients)
      : arrays(tape.problem.bfloat16), out(std::move(gradients)) {
    const PyCell& cell = *tape.cell;
    const Sizes& n = tape.problem.sizes;
    const bool step = tape.step;
    call.problem = tape.problem;
    call.tape = core;
    if (!core) throw RefusedType("tape: expected the dtype of the call");
    call.weights = weights_of(arrays, cell, tape.weights, n);
    if (!tape.packed.is_none()) call.packed = tape.packed.cast<const PyPacked&>().get(T());
    read_inputs(call, arrays, cell, tape.inputs, step);
    call.y = step ? arrays.need(tape.y, "y", {n.B, n.P}) : arrays.need(tape.y, "y", {n.T, n.B, n.P});
    call.dy = over_time(arrays, upstream.dy, "dy", step, n, n.P);
    each_state(cell, n, upstream.dstateT, "dstateT", [&](std::size_t s, const py::object& o, Index width) {
      call.dstateT[s] = arrays.maybe(o, "dstateT", {n.B, width});
    });
    each_state(cell, n, upstream.dstates, "dstates", [&](std::size_t s, const py::object& o, Index width) {
      call.dstates[s] = arrays.sequence(o, "dstates", {n.T, n.B, width});
    });
    call.poll = signals();
    call.dx = step ? arrays.output(out.dx, "dx", {n.B, n.I}) : arrays.output(out.dx, "dx", {n.T, n.B, n.I});
    need_count(out.dweights.size(), "dweights", cell.weights.size());
    call.dweights.resize(out.dweights.size());
    each_weight(cell, n, [&](std::size_t k, Shape shape) {
      if (entry(tape.weights, k).is_none()) out.dweights[k] = py::none();
      call.dweights[k] = arrays.output(out.dweights[k], cell.weights[k].name, shape);
    });
    each_state(cell, n, out.dstate0, "dstate0", [&](std::size_t s, py::object& o, Index width) {
      call.dstate0[s] = arrays.output(o, "dstate0", {n.B, width});
    });
    need_count(out.dscalars.size(), "dscalars", tape.inputs.scalars.size());
    for (py::object& o : out.dscalars) call.dscalars.push_back(arrays.output(o, "dscalars", {n.T, n.B}));
  }

  void run() {
    without_gil([&] {
      arrays.widen();
      backward<T>(call);
      arrays.round();
    });
  }
};

// Those to be made: x's, of each weight, of the initial states, of each row scalar.
Gradients wanted(const PyTape& tape, const std::vector<bool>& flags) {
  const std::size_t weights = tape.weights.size(), scalars = tape.inputs.scalars.size();
  need_count(flags.size(), "need", weights + 2 + scalars);
  Gradients out{{},
                std::vector<py::object>(weights),
                new_states(*tape.cell, flags[1 + weights]),
                std::vector<py::object>(scalars)};
  if (!flags[0]) out.dx = py::none();
  for (std::size_t k = 0; k < weights; ++k)
    if (!flags[1 + k]) out.dweights[k] = py::none();
  for (std::size_t k = 0; k < scalars; ++k)
    if (!flags[2 + weights + k]) out.dscalars[k] = py::none();
  return out;
}

template <class T>
py::tuple backward_as(const PyTape& tape, const Upstream& upstream, Gradients gradients) {
  BackwardSetup<T> setup(tape, tape.get(T()), upstream, std::move(gradients));
  setup.run();
  const Gradients& out = setup.out;
  return py::make_tuple(out.dx, out.dweights,
                        out.dstate0.empty() ? py::object(py::none()) : py::object(tuple_of(out.dstate0)), out.dscalars);
}

py::tuple py_backward(const PyTape& tape, const py::object& dy, const py::tuple& dstateT, const py::tuple& dstates,
                      const std::vector<bool>& need) {
  return (tape.f32 ? backward_as<float> : backward_as<double>)(tape, {dy, dstateT, dstates}, wanted(tape, need));
}

// Backward of run_forward: from the same arguments, its results, and gradients of them to the outputs.
template <class T>
void run_backward_as(PyTape& owner, const Sizes& sizes, const Options& options, bool recompute, const py::object& saved,
                     const Upstream& upstream, Gradients out) {
  const Problem& problem = problem_of(owner, *owner.cell, sizes, options);
  const Save save = recompute ? Save::boundary_states : Save::all;
  const TapePtr<T> tape = tape_over<T>(problem, save, tape_memory<T>(saved, problem, save));
  BackwardSetup<T>(owner, tape.get(), upstream, std::move(out)).run();
}

void py_run_backward(const CellPtr& cell, const py::tuple& weights, const py::object& x, const py::tuple& state0,
                     const py::tuple& scalars, const py::object& lengths, const py::object& reset, bool reverse,
                     Index detach_every, const PyRegularization& regularization, bool recompute, const py::object& y,
                     const py::object& tape, const py::object& dy, const py::tuple& dstateT, const py::tuple& dstates,
                     const py::object& dx, const std::vector<py::object>& dweights,
                     const std::vector<py::object>& dstate0, const std::vector<py::object>& dscalars, bool bfloat16) {
  const Given given(*cell, weights, bfloat16);
  PyTape owner;
  owner.cell = cell, owner.inputs = {x, state0, scalars}, owner.weights = weights, owner.y = y;
  owner.step = is_step(x);
  (given.f32 ? run_backward_as<float>
             : run_backward_as<double>)(owner, with_time(given.sizes, x),
                                        {lengths, reset, reverse, detach_every, regularization, bfloat16}, recompute,
                                        tape, {dy, dstateT, dstates}, {dx, dweights, dstate0, dscalars});
}

// --- memory ----------------------------------------------------------------------------------------------------------

// (rows, width) of a tape, in elements; with lengths as if all rows were as long as the longest.
py::tuple py_tape_shape(const PyCell& cell, Index T, Index B, Index I, Index H, Index P, bool recompute,
                        bool regularized, bool float64, bool bfloat16) {
  Problem problem{cell.core(), {T, B, I, H, P}};
  if (T < 0 || B < 0 || I < 1 || H < 1) throw py::value_error("expected T and B at least 0, I and H at least 1");
  if (cell.projects ? P < 1 || P > H : P != H) throw py::value_error("expected P from 1 to H, or H");
  if (bfloat16 && float64) throw RefusedValue("bfloat16: expected False with float64, got True");
  check_bfloat16(cell, bfloat16);
  problem.bfloat16 = bfloat16;
  if (regularized) problem.regularization.zoneout_h = 1;
  const Save save = recompute ? Save::boundary_states : Save::all;
  const TapeShape shape = float64 ? tape_shape<double>(problem, save) : tape_shape<float>(problem, save);
  return py::make_tuple(shape.rows, shape.width);
}

// An array in memory that is used again once it is released.
py::object py_empty(Index rows, Index width, bool float64) {
  if (rows < 0 || width < 0) throw py::value_error("expected sizes of at least 0");
  return float64 ? py::object(empty<double>({rows, width})) : py::object(empty<float>({rows, width}));
}

// The types whose objects are taken for arrays beside numpy.ndarray, and how they give their memory.
void take_tensors(const py::type& tensor, const py::type& parameter, const py::capsule& api) {
  const auto* found = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  if (found->major != 1 || !found->tensor_from_object) throw py::value_error("another version of DLPack");
  tensor.inc_ref(), parameter.inc_ref(), api.inc_ref();  // never freed
  array_types.tensors[0] = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  array_types.tensors[1] = reinterpret_cast<PyTypeObject*>(parameter.ptr());
  array_types.api = found;
}

}  // namespace
}  // namespace fusedrnn
