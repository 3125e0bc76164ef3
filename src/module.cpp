// fusedrnn._core: check, allocate, call. No maths. SPDX-License-Identifier: Apache-2.0
//
// fusedrnn.backends.arguments raises the readable errors. The checks here are those for memory safety: no call of this
// module, with any arguments, reads or writes outside an array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "api.h"
#include "calls.h"
#include "cpu/arena.h"
#include "cpu/control_word.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "cpu/timing.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

// The arithmetic of a call, for bench/call_overhead.py: the kernels' own call, `times` times, as the binding makes it.
// As with a caller that keeps its state, the results of one call live until the next one has run: two sets of outputs
// alternate, and what forward saves is allocated and freed every time.
template <class T>
void repeat_forward_as(Index times, const PyPacked& packed, const py::object& x, const py::tuple& state0, Save save) {
  const py::object none = py::none();
  const PyRegularization no_regularization;
  const auto setup = [&] {
    const Options options = {none, none, false, 0, no_regularization};
    ForwardSetup<T> made(*packed.cell, Given(packed), {x, state0, py::tuple()}, options,
                         {{}, new_states(*packed.cell, true), {}});
    made.call.save = save;
    return made;
  };
  const ForwardSetup<T> even = setup(), odd = setup();
  without_gil([&] {
    TapePtr<T> last;
    for (Index i = 0; i < times; ++i) last = forward<T>(i % 2 ? odd.call : even.call);
  });
}

template <class T>
void repeat_backward_as(Index times, const PyTape& tape, const py::object& dy) {
  const py::tuple none;
  const std::vector<bool> all(tape.weights.size() + tape.inputs.scalars.size() + 2, true);
  const BackwardSetup<T> even(tape, tape.get(T()), {dy, none, none}, wanted(tape, all)),
      odd(tape, tape.get(T()), {dy, none, none}, wanted(tape, all));
  without_gil([&] {
    for (Index i = 0; i < times; ++i) backward<T>(i % 2 ? odd.call : even.call);
  });
}

template <class T>
py::array_t<T> activation_as(int which, const py::object& x, const std::string& isa) {
  const Index n = array_view(x, "x").shape[0];
  const T* in = need<T>(x, "x", {n});
  py::array_t<T> out = empty<T>({n});
  const cpu::Kernels<T>* kernels = &cpu::kernels<T>();
  if (!isa.empty()) {
    kernels = nullptr;
    for (cpu::Isa level : cpu::all_isas)
      if (isa == cpu::name(level) && cpu::available(level)) kernels = cpu::kernels_of<T>(level);
    if (!kernels) throw py::value_error("isa: expected an available instruction set, got " + isa);
  }
  const cpu::ControlWord word;
  kernels->activation(which, in, out.mutable_data(), n);
  return out;
}

const char* thread_pool() { return cpu::thread_pool() == cpu::ThreadPool::openmp ? "openmp" : "own"; }

py::dict info() {
  py::dict d;
  py::list built, detected;
  for (cpu::Isa level : cpu::all_isas) {
    if (cpu::built(level)) built.append(cpu::name(level));
    if (cpu::detected(level)) detected.append(cpu::name(level));
  }
  d["version"] = FUSEDRNN_VERSION;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["built"] = built, d["detected"] = detected, d["isa"] = cpu::name(cpu::chosen()), d["threads"] = cpu::num_threads();
  d["ordered_copies"] = cpu::name(cpu::ordered_copies());
  d["prefetch"] = cpu::prefetch_weights();
  const cpu::Bfloat16Isa low = cpu::chosen_bfloat16();
  d["bfloat16"] = low == cpu::Bfloat16Isa::none ? py::object(py::none()) : py::object(py::str(cpu::name(low)));
  return d;
}

// The type of a cell, and the memory layout of what the kernels keep.
py::tuple cell_layout(const PyCell& cell, bool regularized) {
  cell.need_compiled();
  static const char* const types[] = {
#define X(id, type) #type,
#include "cells/cells.def"
#undef X
  };
  const cpu::Kernels<float>& kernels = cpu::kernels<float>();
  const cpu::CellShape& shape = (regularized ? kernels.regularized : kernels.cells)[int(cell.id)].shape;
  py::list parts;
  for (const Part& part : {shape.input, shape.recurrent, shape.recurrent2})
    parts.append(py::make_tuple(part.first, std::vector<int>(part.gate, part.gate + part.count)));
  const std::string type = regularized ? std::string("Regularized<") + types[int(cell.id)] + ">" : types[int(cell.id)];
  return py::make_tuple(type, shape.accumulators, shape.saved, shape.has_c, parts, shape.layer_norm);
}

// The number of threads, whether by rows of the batch, and backward's chunks of steps: for docs/scaling.md, in float32.
py::tuple split(const PyCell& cell, Index T, Index B, Index I, Index H, int threads) {
  cell.need_compiled();
  if (T < 0 || B < 0 || I < 1 || H < 1 || threads < 1)
    throw py::value_error("sizes: expected T and B at least 0, and I, H and threads at least 1");
  const Sizes sizes = {T, B, I, H, H};
  const Split found = split_of<float>(cell.id, sizes, threads);
  return py::make_tuple(found.threads, found.by_rows, chunks_of<float>(cell.id, sizes));
}

unsigned long control_word() {
#if defined(__x86_64__)
  return _mm_getcsr();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of fusedrnn. Use fusedrnn.kernels; this module checks only what memory safety needs.";
  py::class_<PyCell, std::shared_ptr<PyCell>>(m, "Cell", "A compiled cell, by its place in CELLS.")
      .def(py::init([](int id) { return std::make_shared<PyCell>(cell_of(id)); }), py::arg("id"));
  py::class_<PyPacked>(m, "Packed", "Weights in the order of the kernels.");
  py::class_<PyTape>(m, "Tape", "What forward saved for backward.")
      .def_property_readonly("bytes", [](const PyTape& t) { return t.f32 ? tape_bytes(*t.f32) : tape_bytes(*t.f64); })
      .def_property_readonly("sizes", [](const PyTape& t) { return sizes_of(t); });
  array_types.numpy =
      reinterpret_cast<PyTypeObject*>(py::module_::import("numpy").attr("ndarray").ptr());  // never freed
  py::register_exception<RefusedType>(m, "RefusedType", PyExc_TypeError);
  py::register_exception<RefusedValue>(m, "RefusedValue", PyExc_ValueError);
  py::list cells;
#define X(id, type) cells.append(#id);
#include "cells/cells.def"
#undef X
  m.attr("CELLS") = py::tuple(cells);
  py::list operations;
#define X(name, count) operations.append(#name);
#include "cpu/machine/operations.def"
#undef X
  m.attr("MACHINE_OPERATIONS") = py::tuple(operations);
  using Limits = cpu::MachineLimits;  // of what a cell's forward function shows
  m.attr("MACHINE_LIMITS") =
      py::dict(py::arg("operations") = int(Limits::operations), py::arg("states") = int(Limits::states),
               py::arg("accumulators") = int(Limits::accumulators), py::arg("vectors") = int(Limits::vectors));
  m.def("machine_plan", &py_machine_plan, py::arg("numbers"), py::arg("start"), py::arg("constants"));
  m.def("pack", &py_pack, py::arg("cell").none(false), py::arg("weights"), py::arg("bfloat16") = false);
  m.def("forward", &py_forward, py::arg("packed"), py::arg("cell"), py::arg("x"), py::arg("state0"), py::arg("scalars"),
        py::arg("lengths"), py::arg("reset"), py::arg("reverse"), py::arg("detach_every"), py::arg("regularization"),
        py::arg("return_states"), py::arg("save"));
  m.def("backward", &py_backward, py::arg("tape"), py::arg("dy"), py::arg("dstateT"), py::arg("dstates"),
        py::arg("need"));
  m.def("run_forward", &py_run_forward, py::arg("cell"), py::arg("weights"), py::arg("x"), py::arg("state0"),
        py::arg("scalars"), py::arg("lengths"), py::arg("reset"), py::arg("reverse"), py::arg("detach_every"),
        py::arg("regularization"), py::arg("recompute"), py::arg("y"), py::arg("stateT"), py::arg("states"),
        py::arg("tape"), py::arg("bfloat16") = false);
  m.def("run_backward", &py_run_backward, py::arg("cell").none(false), py::arg("weights"), py::arg("x"),
        py::arg("state0"), py::arg("scalars"), py::arg("lengths"), py::arg("reset"), py::arg("reverse"),
        py::arg("detach_every"), py::arg("regularization"), py::arg("recompute"), py::arg("y"), py::arg("tape"),
        py::arg("dy"), py::arg("dstateT"), py::arg("dstates"), py::arg("dx"), py::arg("dweights"), py::arg("dstate0"),
        py::arg("dscalars"), py::arg("bfloat16") = false);
  m.def("tape_shape", &py_tape_shape, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("P"), py::arg("recompute"), py::arg("regularized"), py::arg("float64"), py::arg("bfloat16") = false);
  m.def("has_bfloat16", &has_bfloat16);
  m.def("cell_layout", &cell_layout, py::arg("cell"), py::arg("regularized"));
  m.def("empty", &py_empty, py::arg("rows"), py::arg("width"), py::arg("float64"));
  m.def("take_tensors", &take_tensors, py::arg("tensor"), py::arg("parameter"), py::arg("api"));
  m.def("info", &info);
  m.def("num_threads", &cpu::num_threads);
  m.def("set_num_threads", &cpu::set_num_threads, py::arg("threads"));
  m.def("thread_pool", &thread_pool);
  m.def(
      "set_thread_pool",
      [](bool openmp) { cpu::set_thread_pool(openmp ? cpu::ThreadPool::openmp : cpu::ThreadPool::own); },
      py::arg("openmp"));
  m.def("set_flush_subnormals", &set_flush_subnormals, py::arg("on"));

  py::module_ testing = m.def_submodule("testing", "Hooks of the test suite.");
  testing.def(
      "activation",
      [](int which, const py::object& x, const std::string& isa) -> py::object {
        return is_float32(x, "x", 1) ? py::object(activation_as<float>(which, x, isa))
                                     : py::object(activation_as<double>(which, x, isa));
      },
      py::arg("which"), py::arg("x"), py::arg("isa") = "");
  testing.def(
      "repeat_forward",
      [](Index times, const PyPacked& packed, const py::object& x, const py::tuple& state0, bool save) {
        (packed.f32 ? repeat_forward_as<float> : repeat_forward_as<double>)(times, packed, x, state0,
                                                                            save ? Save::all : Save::nothing);
      },
      py::arg("times"), py::arg("packed"), py::arg("x"), py::arg("state0"), py::arg("save"));
  testing.def(
      "repeat_backward",
      [](Index times, const PyTape& tape, const py::object& dy) {
        tape.f32 ? repeat_backward_as<float>(times, tape, dy) : repeat_backward_as<double>(times, tape, dy);
      },
      py::arg("times"), py::arg("tape"), py::arg("dy"));
  testing.def("split", &split, py::arg("cell"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
              py::arg("threads"));
  testing.attr("SPLIT_RULE") =
      py::dict(py::arg("call") = SplitRule::call, py::arg("step") = SplitRule::step,
               py::arg("core_cache") = std::size_t(SplitRule::core_cache), py::arg("rows") = Index(SplitRule::rows));
  const py::call_guard<py::gil_scoped_release> released;
  testing.def("time_region", &cpu::time_region, py::arg("threads"), py::arg("idle") = 0.0, released);
  testing.def("time_barriers", &cpu::time_barriers, py::arg("threads"), py::arg("count"), released);
  testing.def("time_transfers", &cpu::time_transfers, py::arg("count"), released);
  testing.def("time_reads", &cpu::time_reads, py::arg("threads"), py::arg("bytes"), py::arg("passes"), released);
  testing.def("control_word", &control_word);
  testing.def("thresholds", &set_thresholds, py::arg("on"));
  testing.def(
      "ordered_copies", [](const std::string& name) { cpu::set_ordered_copies(cpu::ordered_copies_of(name)); },
      py::arg("name"));
  testing.def("prefetch", &cpu::set_prefetch_weights, py::arg("on"));
  testing.def("poison", &cpu::poison, py::arg("on"));
  testing.def("fail_allocation_after", &cpu::fail_allocation_after, py::arg("count"));
  testing.def("arena", [] {
    const cpu::ArenaUse use = cpu::arena_use();
    return py::make_tuple(use.live, use.cached, use.limit);
  });
  testing.def("trim_arena", &cpu::trim_arena);
}
