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
#include <vector>

#include "api.h"
#include "arrays.h"
#include "bfloat16.h"
#include "cpu/dispatch.h"

namespace fusedrnn {
namespace {

// Weights of a layer, in the order of fusedrnn.backends.protocol.Weights, and what a gradient is asked for: these, x
// and the initial state.
constexpr int kWeights = 9, kNeeds = kWeights + 2;

const cpu::CellShape& shape_of(CellId cell) { return cpu::kernels<float>().cells[int(cell)].shape; }

CellId cell_of(int id) {
  if (id < 0 || id >= cpu::kCells)
    throw py::value_error("cell: expected 0 to " + std::to_string(cpu::kCells - 1) + ", got " + std::to_string(id));
  return CellId(id);
}

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
  CellId cell;
  Index I, H, P;
  bool bfloat16;
  py::object weights[kWeights];
};

// A problem with copies of its lengths and resets: what backward walks by must be what forward walked by, whatever
// becomes of the caller's.
struct OwnProblem {
  Problem problem;
  std::vector<Index> lengths;
  std::vector<unsigned char> reset;
};

py::tuple sizes_of(const OwnProblem& owner) {
  const Sizes& n = owner.problem.sizes;
  return py::make_tuple(n.T, n.B, n.I, n.H, n.P);
}

struct PyTape : OfDtype<TapePtr>, OwnProblem {
  py::object x, y, h0, c0, weights[kWeights];
  py::object packed = py::none();  // kept for boundary states only, which run forward again
};

// fusedrnn.backends.protocol.Regularization: the rates, the seed (None: evaluation) and the stream; or None.
using PyRegularization = std::optional<std::tuple<double, double, double, std::optional<std::uint64_t>, std::uint32_t>>;

Regularization regularization_of(const PyRegularization& given, bool c) {
  if (!given) return {};
  const auto& [recurrent_dropout, zoneout_h, zoneout_c, seed, stream] = *given;
  for (const double rate : {recurrent_dropout, zoneout_h, zoneout_c})
    if (!(rate >= 0 && rate <= 1))
      throw RefusedValue("regularization: expected rates from 0 to 1, got " + std::to_string(rate));
  if (zoneout_c > 0 && !c) throw RefusedValue("zoneout_c: expected 0 for a cell without c");
  return {recurrent_dropout, zoneout_h, zoneout_c, seed.has_value(), seed.value_or(0), stream};
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

// H, by the rows of weight_ih.
Index hidden_size(CellId cell, const py::object& weight_ih) {
  const View a = array_view(weight_ih, "weight_ih");
  if (a.ndim != 2 || a.shape[0] < shape_of(cell).gates || a.shape[1] == 0)
    throw RefusedValue("weight_ih: expected (G*H, I), H and I at least 1, got " + a.text());
  return a.shape[0] / shape_of(cell).gates;
}

// P, by the rows of weight_hr; H where nothing is projected.
Index projected_size(bool there, const py::object& weight_hr, Index H) {
  if (!there) return H;
  const View a = array_view(weight_hr, "weight_hr");
  if (a.ndim != 2 || a.shape[0] < 1 || a.shape[0] > H)
    throw RefusedValue("weight_hr: expected (P, H), P from 1 to H = " + std::to_string(H) + ", got " + a.text());
  return a.shape[0];
}

template <class T>
Weights<const T> weights_of(Arrays<T>& arrays, const py::object* w, CellId cell, Index I, Index H, Index P) {
  const Index rows = shape_of(cell).gates * H;
  Weights<const T> weights = {arrays.matrix(w[0], "weight_ih", {rows, I}), arrays.matrix(w[1], "weight_hh", {rows, P}),
                              arrays.maybe(w[2], "bias_ih", {rows}), arrays.maybe(w[3], "bias_hh", {rows})};
  const T** to[] = {&weights.gain_ih, &weights.gain_hh, &weights.gain_c, &weights.bias_c};
  const char* names[] = {"gain_ih", "gain_hh", "gain_c", "bias_c"};
  for (int i = 0; i < 4; ++i) {
    if (shape_of(cell).layer_norm && (i < 2 || shape_of(cell).has_c))
      *to[i] = arrays.need(w[4 + i], names[i], {i < 2 ? rows : H});
    else if (!w[4 + i].is_none())
      throw RefusedValue(std::string(names[i]) + ": expected None for this cell");
  }
  if (shape_of(cell).projects)
    weights.weight_hr = arrays.matrix(w[8], "weight_hr", {P, H});
  else if (!w[8].is_none())
    throw RefusedValue("weight_hr: expected None for this cell");
  return weights;
}

template <class T>
std::unique_ptr<PyPacked> pack_as(CellId cell, const py::object* w, bool bfloat16) {
  View ih;
  view_of(w[0], ih);
  const Index I = ih.shape[1], H = hidden_size(cell, w[0]), P = projected_size(shape_of(cell).projects, w[8], H);
  auto packed = std::make_unique<PyPacked>();
  packed->cell = cell, packed->I = I, packed->H = H, packed->P = P, packed->bfloat16 = bfloat16;
  for (int i = 0; i < kWeights; ++i) packed->weights[i] = w[i];
  Arrays<T> arrays(bfloat16);
  const Weights<const T> view = weights_of<T>(arrays, w, cell, I, H, P);
  packed->slot(T()) = without_gil([&] {
    arrays.widen();
    return pack<T>(cell, I, H, P, view, signals(), bfloat16);
  });
  return packed;
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

void check_bfloat16(bool bfloat16) {
  if (bfloat16 && !has_bfloat16()) throw RefusedValue("bfloat16: expected False on this processor, got True");
}

std::unique_ptr<PyPacked> py_pack(int id, py::object weight_ih, py::object weight_hh, py::object bias_ih,
                                  py::object bias_hh, py::object gain_ih, py::object gain_hh, py::object gain_c,
                                  py::object bias_c, py::object weight_hr, bool bfloat16) {
  const CellId cell = cell_of(id);
  check_bfloat16(bfloat16);
  const bool f32 = is_float32(weight_ih, "weight_ih", 2, bfloat16);
  const py::object w[kWeights] = {weight_ih, weight_hh, bias_ih, bias_hh, gain_ih, gain_hh, gain_c, bias_c, weight_hr};
  return (f32 ? pack_as<float> : pack_as<double>)(cell, w, bfloat16);
}

// What a call is, apart from its arrays over time.
struct Options {
  const py::object &lengths, &reset;
  bool reverse = false;
  Index detach_every = 0;
  const PyRegularization regularization{};
  bool bfloat16 = false;
};

Problem problem_of(OwnProblem& owner, CellId cell, const Sizes& sizes, const Options& options) {
  check_bfloat16(options.bfloat16);
  owner.problem = {cell,
                   sizes,
                   nullptr,
                   nullptr,
                   options.reverse,
                   options.detach_every,
                   regularization_of(options.regularization, shape_of(cell).has_c),
                   options.bfloat16};
  if (options.detach_every < 0)
    throw RefusedValue("detach_every: expected 1 or more, or none, got " + std::to_string(options.detach_every));
  set_rows(owner, options.lengths, options.reset);
  return owner.problem;
}

// Outputs of forward: null before they are made, None where there is none. One step that is not a sequence has no y.
struct Outputs {
  py::object y, hT, cT, h_states, c_states;
};

// x of a sequence (T, B, I), or of one step (B, I).
struct Time {
  Index T, B, I;
  bool step;
};
Time time_of(const py::object& x) {
  const View a = array_view(x, "x");
  if (a.ndim == 2) return {1, a.shape[0], a.shape[1], true};
  if (a.ndim == 3) return {a.shape[0], a.shape[1], a.shape[2], false};
  throw RefusedValue("x: expected 2 or 3 axes, got " + a.text());
}
// What is of x's kind: a sequence over time, or a step.
template <class T>
Sequence<const T> over_time(Arrays<T>& arrays, const py::object& o, const char* name, const Time& n, Index width) {
  return n.step ? arrays.sequence(o, name, {n.B, width}) : arrays.sequence(o, name, {n.T, n.B, width});
}

// One forward call: checked, its outputs allocated, nothing run yet.
template <class T>
struct ForwardSetup {
  ForwardCall<T> call{};
  std::unique_ptr<PyTape> tape = std::make_unique<PyTape>();  // owns the lengths and resets that `call` points to
  Arrays<T> arrays;
  Outputs out;

  // Of packed weights, or as they are.
  ForwardSetup(CellId cell, const PyPacked* packed, const py::object* weights, const py::object& x,
               const py::object& h0, const py::object& c0, const Options& options, Outputs given)
      : arrays(options.bfloat16), out(std::move(given)) {
    const Time n = time_of(x);
    const Index H = packed ? packed->H : hidden_size(cell, weights[0]);
    const Index P = packed ? packed->P : projected_size(shape_of(cell).projects, weights[8], H);
    const bool c = shape_of(cell).has_c;
    call.problem = problem_of(*tape, cell, {n.T, n.B, n.I, H, P}, options);
    if (packed) {
      call.packed = packed->get(T());
      if (!call.packed || packed->bfloat16 != options.bfloat16)
        throw RefusedType("x: expected the dtype of the weights");
      if (packed->I != n.I) throw RefusedValue("x: expected " + std::to_string(packed->I) + " features");
    } else {
      call.weights = weights_of(arrays, weights, cell, n.I, H, P);
    }
    call.x = over_time(arrays, x, "x", n, n.I);
    call.h0 = arrays.maybe(h0, "h0", {n.B, P});
    if (c) call.c0 = arrays.maybe(c0, "c0", {n.B, H});
    call.poll = signals();
    if (!n.step) call.y = arrays.output(out.y, "y", {n.T, n.B, P});
    call.hT = arrays.output(out.hT, "hT", {n.B, P});
    if (n.step) call.y = call.hT;
    if (c) call.cT = arrays.output(out.cT, "cT", {n.B, H});
    call.h_states = arrays.output(out.h_states, "h_states", {n.T, n.B, P});
    if (c) call.c_states = arrays.output(out.c_states, "c_states", {n.T, n.B, H});
    for (const py::object* o : {&out.hT, n.step ? &out.hT : &out.y, c ? &out.cT : &out.hT})
      if (o->is_none()) throw RefusedType("y, hT, cT: expected arrays, got None");
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

template <class T>
py::tuple forward_as(const py::object& packed_object, const py::object& x, const py::object& h0, const py::object& c0,
                     bool return_states, Save save, const Options& options) {
  const PyPacked& packed = packed_object.cast<const PyPacked&>();
  const py::object none = py::none();
  Outputs out;
  if (!shape_of(packed.cell).has_c) out.cT = none;
  if (!return_states) out.h_states = none;
  if (!return_states || !shape_of(packed.cell).has_c) out.c_states = none;
  ForwardSetup<T> setup(packed.cell, &packed, nullptr, x, h0, c0, options, out);
  setup.call.save = save;
  setup.tape->slot(T()) = setup.run();
  py::object kept = none;
  if (save != Save::nothing) {
    PyTape& tape = *setup.tape;
    if (save == Save::boundary_states) tape.packed = packed_object;
    tape.x = x, tape.y = setup.out.y, tape.h0 = h0, tape.c0 = c0;
    for (int i = 0; i < kWeights; ++i) tape.weights[i] = packed.weights[i];
    kept = py::cast(std::move(setup.tape));
  }
  const Outputs& o = setup.out;
  return py::make_tuple(o.y, o.hT, o.cT, o.h_states, o.c_states, kept);
}

Save save_of(int id) {
  if (id < 0 || id > 2)
    throw py::value_error("save: expected 0 (nothing), 1 (all) or 2 (boundary states), got " + std::to_string(id));
  return Save(id);
}

py::tuple py_forward(const py::object& packed, const py::object& x, const py::object& h0, const py::object& c0,
                     const py::object& lengths, const py::object& reset, bool reverse, bool return_states, int save_id,
                     Index detach_every, const PyRegularization& regularization) {
  if (!py::isinstance<PyPacked>(packed))
    throw py::type_error("packed: expected what pack returned, got " + type_name(packed));
  const PyPacked& given = packed.cast<const PyPacked&>();
  return (is_float32(x, "x", 3, given.bfloat16)
              ? forward_as<float>
              : forward_as<double>)(packed, x, h0, c0, return_states, save_of(save_id),
                                    {lengths, reset, reverse, detach_every, regularization, given.bfloat16});
}

// All weights, or as many packed.
struct Given {
  const PyPacked* packed = nullptr;
  py::object weights[kWeights];

  explicit Given(CellId cell, const py::object& o) {
    if (py::isinstance<PyPacked>(o)) {
      packed = &o.cast<const PyPacked&>();
      if (packed->cell != cell) throw py::value_error("weights: packed for another cell");
      return;
    }
    if (!PyTuple_CheckExact(o.ptr()) || PyTuple_GET_SIZE(o.ptr()) != kWeights)
      throw py::type_error("weights: expected a tuple of " + std::to_string(kWeights) + " or packed ones");
    for (int i = 0; i < kWeights; ++i) weights[i] = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(o.ptr(), i));
  }
};

// The memory of a tape in an array (rows, width): those rows that there are, or more.
template <class T>
T* tape_memory(const py::object& o, const Problem& problem, Save save) {
  const View a = array_view(o, "tape");
  const TapeShape shape = tape_shape<T>(problem, save);
  const Index rows = a.ndim == 2 ? std::max(a.shape[0], shape.rows) : shape.rows;
  return const_cast<T*>(need<T>(o, "tape", {rows, shape.width}));
}

// Forward of weights as they are now, with nothing kept: all that backward needs is in arrays of the caller's. `tape`
// is None where nothing is saved.
template <class T>
void run_forward_as(CellId cell, const Given& given, const py::object& x, const py::object& h0, const py::object& c0,
                    bool recompute, const Options& options, const Outputs& out, const py::object& saved) {
  ForwardSetup<T> setup(cell, given.packed, given.weights, x, h0, c0, options, out);
  if (!saved.is_none()) {
    setup.call.save = recompute ? Save::boundary_states : Save::all;
    setup.call.saved = tape_memory<T>(saved, setup.call.problem, setup.call.save);
    // What ragged rows leave of it is 0, so that it is the same for the same inputs.
    View a;
    view_of(saved, a);
    const TapeShape shape = tape_shape<T>(setup.call.problem, setup.call.save);
    std::fill(setup.call.saved + shape.rows * shape.width, setup.call.saved + a.shape[0] * shape.width, T(0));
  }
  setup.tape->slot(T()) = setup.run();
}

void py_run_forward(int id, const py::object& weights, const py::object& x, const py::object& h0, const py::object& c0,
                    const py::object& lengths, const py::object& reset, bool reverse, bool recompute,
                    Index detach_every, const PyRegularization& regularization, const py::object& y,
                    const py::object& hT, const py::object& cT, const py::object& h_states, const py::object& c_states,
                    const py::object& tape, bool bfloat16) {
  const CellId cell = cell_of(id);
  const Given given(cell, weights);
  (is_float32(hT, "hT", 2, bfloat16)
       ? run_forward_as<float>
       : run_forward_as<double>)(cell, given, x, h0, c0, recompute,
                                 {lengths, reset, reverse, detach_every, regularization, bfloat16},
                                 {y, hT, cT, h_states, c_states}, tape);
}

// One backward call: checked, its outputs allocated, nothing run yet.
template <class T>
struct BackwardSetup {
  BackwardCall<T> call{};
  Arrays<T> arrays;
  std::vector<py::object> out;  // dx, of the weights, dh0, dc0: null before they are made, None where not wanted

  BackwardSetup(const PyTape& tape, const Tape<T>* core, const Time& n, const py::object& dy, const py::object& dhT,
                const py::object& dcT, const py::object& dh_states, const py::object& dc_states,
                std::vector<py::object> given)
      : arrays(tape.problem.bfloat16), out(std::move(given)) {
    const CellId cell = tape.problem.cell;
    const Index H = tape.problem.sizes.H, P = tape.problem.sizes.P, rows = shape_of(cell).gates * H;
    const bool c = shape_of(cell).has_c;
    call.problem = tape.problem;
    call.tape = core;
    if (!core) throw RefusedType("tape: expected the dtype of the call");
    call.weights = weights_of(arrays, tape.weights, cell, n.I, H, P);
    call.x = over_time(arrays, tape.x, "x", n, n.I);
    if (!tape.packed.is_none()) call.packed = tape.packed.cast<const PyPacked&>().get(T());
    call.y = n.step ? arrays.need(tape.y, "y", {n.B, P}) : arrays.need(tape.y, "y", {n.T, n.B, P});
    call.h0 = arrays.maybe(tape.h0, "h0", {n.B, P});
    if (c) call.c0 = arrays.maybe(tape.c0, "c0", {n.B, H});
    call.dy = over_time(arrays, dy, "dy", n, P);
    call.dhT = arrays.maybe(dhT, "dhT", {n.B, P});
    call.dh_states = arrays.sequence(dh_states, "dh_states", {n.T, n.B, P});
    if (c) {
      call.dcT = arrays.maybe(dcT, "dcT", {n.B, H});
      call.dc_states = arrays.sequence(dc_states, "dc_states", {n.T, n.B, H});
    }
    call.poll = signals();
    for (int i = 0; i < kWeights; ++i)
      if (tape.weights[i].is_none()) out[1 + i] = py::none();
    if (!c) out[kNeeds] = py::none();
    call.dx = n.step ? arrays.output(out[0], "dx", {n.B, n.I}) : arrays.output(out[0], "dx", {n.T, n.B, n.I});
    Weights<T>& dw = call.dweights;
    dw.weight_ih = arrays.output(out[1], "dweight_ih", {rows, n.I});
    dw.weight_hh = arrays.output(out[2], "dweight_hh", {rows, P});
    dw.bias_ih = arrays.output(out[3], "dbias_ih", {rows}), dw.bias_hh = arrays.output(out[4], "dbias_hh", {rows});
    dw.gain_ih = arrays.output(out[5], "dgain_ih", {rows}), dw.gain_hh = arrays.output(out[6], "dgain_hh", {rows});
    dw.gain_c = arrays.output(out[7], "dgain_c", {H}), dw.bias_c = arrays.output(out[8], "dbias_c", {H});
    dw.weight_hr = arrays.output(out[9], "dweight_hr", {P, H});
    call.dh0 = arrays.output(out[10], "dh0", {n.B, P}), call.dc0 = arrays.output(out[11], "dc0", {n.B, H});
  }

  void run() {
    without_gil([&] {
      arrays.widen();
      backward<T>(call);
      arrays.round();
    });
  }
};

Time time_of(const PyTape& tape) {
  const Sizes& n = tape.problem.sizes;
  return {n.T, n.B, n.I, false};
}

// Outputs to be made: those that are needed.
std::vector<py::object> outputs(const std::vector<bool>& need_of) {
  if (need_of.size() != kNeeds)
    throw py::value_error("need: expected " + std::to_string(kNeeds) + " flags, got " + std::to_string(need_of.size()));
  std::vector<py::object> out(kNeeds + 1);
  for (int i = 0; i < kNeeds + 1; ++i)
    if (!need_of[std::min(i, kNeeds - 1)]) out[i] = py::none();
  return out;
}

template <class T>
py::tuple backward_as(const PyTape& tape, const py::object& dy, const py::object& dhT, const py::object& dcT,
                      const py::object& dh_states, const py::object& dc_states, const std::vector<bool>& need_of) {
  BackwardSetup<T> setup(tape, tape.get(T()), time_of(tape), dy, dhT, dcT, dh_states, dc_states, outputs(need_of));
  setup.run();
  return py::tuple(py::cast(setup.out));
}

py::tuple py_backward(const PyTape& tape, const py::object& dy, const py::object& dhT, const py::object& dcT,
                      const py::object& dh_states, const py::object& dc_states, const std::vector<bool>& need_of) {
  return (tape.f32 ? backward_as<float> : backward_as<double>)(tape, dy, dhT, dcT, dh_states, dc_states, need_of);
}

// Backward of run_forward: from the same arguments, its results, and gradients of them to the outputs.
template <class T>
void run_backward_as(CellId cell, PyTape& owner, bool recompute, const Options& options, const py::object& saved,
                     const py::object* upstream, std::vector<py::object> out) {
  const Time n = time_of(owner.x);
  const Index H = hidden_size(cell, owner.weights[0]), P = projected_size(shape_of(cell).projects, owner.weights[8], H);
  const Problem problem = problem_of(owner, cell, {n.T, n.B, n.I, H, P}, options);
  const Save save = recompute ? Save::boundary_states : Save::all;
  const TapePtr<T> tape = tape_over<T>(problem, save, tape_memory<T>(saved, problem, save));
  BackwardSetup<T>(owner, tape.get(), n, upstream[0], upstream[1], upstream[2], upstream[3], upstream[4],
                   std::move(out))
      .run();
}

void py_run_backward(int id, const py::object& weights, const py::object& x, const py::object& h0, const py::object& c0,
                     const py::object& lengths, const py::object& reset, bool reverse, bool recompute,
                     Index detach_every, const PyRegularization& regularization, const py::object& y,
                     const py::object& tape, const py::object& dy, const py::object& dhT, const py::object& dcT,
                     const py::object& dh_states, const py::object& dc_states, std::vector<py::object> out,
                     bool bfloat16) {
  const CellId cell = cell_of(id);
  const Given given(cell, weights);
  if (given.packed) throw py::type_error("weights: expected a tuple, not packed ones");
  if (out.size() != kNeeds + 1)
    throw py::value_error("out: expected " + std::to_string(kNeeds + 1) + " arrays, got " + std::to_string(out.size()));
  PyTape owner;
  owner.x = x, owner.y = y, owner.h0 = h0, owner.c0 = c0;
  for (int i = 0; i < kWeights; ++i) owner.weights[i] = given.weights[i];
  const py::object upstream[] = {dy, dhT, dcT, dh_states, dc_states};
  (is_float32(owner.weights[0], "weight_ih", 2, bfloat16)
       ? run_backward_as<float>
       : run_backward_as<double>)(cell, owner, recompute,
                                  {lengths, reset, reverse, detach_every, regularization, bfloat16}, tape, upstream,
                                  std::move(out));
}

// (rows, width) of a tape, in elements; with lengths as if all rows were as long as the longest.
py::tuple py_tape_shape(int id, Index T, Index B, Index I, Index H, Index P, bool recompute, bool regularized,
                        bool float64, bool bfloat16) {
  Problem problem{cell_of(id), {T, B, I, H, P}};
  if (T < 0 || B < 0 || I < 1 || H < 1) throw py::value_error("expected T and B at least 0, I and H at least 1");
  if (shape_of(problem.cell).projects ? P < 1 || P > H : P != H) throw py::value_error("expected P from 1 to H, or H");
  if (bfloat16 && float64) throw RefusedValue("bfloat16: expected False with float64, got True");
  check_bfloat16(bfloat16);
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
