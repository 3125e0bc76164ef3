// fusedrnn._core: check, allocate, call. No maths. SPDX-License-Identifier: Apache-2.0
//
// fusedrnn.backends.arguments gives the readable errors; the checks here are the ones that memory safety rests on, so
// that no call of this module, however wrong, reads or writes outside an array.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "api.h"
#include "cpu/arena.h"
#include "cpu/control_word.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "cpu/timing.h"

namespace py = pybind11;
using namespace fusedrnn;

namespace {

using Shape = std::initializer_list<Index>;  // without a vector's memory: many are made in every call

std::string text(const std::vector<Index>& shape) {
  std::string s = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

std::string text(const py::array& a) {
  return py::str(a.dtype()).cast<std::string>() + " " + text(std::vector<Index>(a.shape(), a.shape() + a.ndim()));
}

// An argument that a kernel cannot take as it is; in Python RefusedType, a TypeError, and RefusedValue, a ValueError.
// Classes of their own, so that fusedrnn.backends.cpu can tell them from what a signal handler raises.
struct RefusedType : py::type_error {
  using py::type_error::type_error;
};
struct RefusedValue : py::value_error {
  using py::value_error::value_error;
};

// Arrays of exactly this type: a subclass may mean more than its data says, as masked arrays do.
PyTypeObject* array_type = nullptr;  // numpy.ndarray

bool is_array(const py::object& o) { return Py_TYPE(o.ptr()) == array_type; }

// The array's data, if it is T in native byte order, aligned, of this shape and, from axis `strided` on, contiguous.
// Axes before `strided` may have any stride. Checked by hand: py::array_t would copy silently.
template <class T>
const T* need(const py::object& o, const char* name, Shape shape, int strided = 0) {
  const auto expected = [&] {  // made only when it is needed: NumPy is slow at naming a dtype
    return name + (": expected " + py::str(py::dtype::of<T>()).cast<std::string>() + " ") + text(shape) + ", got ";
  };
  if (!is_array(o)) throw RefusedType(expected() + py::str(py::type::of(o)).cast<std::string>());
  const py::array a = py::reinterpret_borrow<py::array>(o);
  if (!a.dtype().is(py::dtype::of<T>()) && !a.dtype().equal(py::dtype::of<T>()))
    throw RefusedType(expected() + text(a));
  const Index* expects = shape.begin();
  bool same = a.ndim() == Index(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = a.shape(Index(i)) == expects[i];
  if (!same) throw RefusedValue(expected() + text(a));
  bool contiguous = reinterpret_cast<std::uintptr_t>(a.data()) % alignof(T) == 0;
  Index step = sizeof(T);
  for (Index i = Index(shape.size()) - 1; i >= strided; --i) {
    if (expects[i] > 1 && a.size() && a.strides(i) != step) contiguous = false;
    step *= expects[i];
  }
  for (Index i = 0; i < strided; ++i) contiguous = contiguous && a.strides(i) % Index(sizeof(T)) == 0;
  if (!contiguous) throw RefusedValue(expected() + text(a) + ", not aligned or not contiguous in memory");
  return static_cast<const T*>(a.data());
}

template <class T>
const T* maybe(const py::object& o, const char* name, Shape shape) {
  return o.is_none() ? nullptr : need<T>(o, name, shape);
}

template <class T>
Sequence<const T> sequence(const py::object& o, const char* name, Shape shape) {
  if (o.is_none()) return {};
  const T* data = need<T>(o, name, shape, 2);
  const py::array a = py::reinterpret_borrow<py::array>(o);
  return {data, Index(a.strides(0) / Index(sizeof(T))), Index(a.strides(1) / Index(sizeof(T)))};
}

// An output. Large ones come from the kernels' own recycled memory: fresh pages would cost as much as filling them.
// What has to lie on a cache line does, too.
template <class T>
py::array_t<T> empty(Shape shape, bool on_line = false) {
  std::size_t bytes = sizeof(T);
  for (Index n : shape) bytes = cpu::checked_product({bytes, std::size_t(n)});
  if (bytes < (std::size_t(1) << 16) && !on_line) return py::array_t<T>(shape);
  auto memory = std::make_unique<cpu::Buffer>(bytes);
  T* data = memory->as<T>();
  const py::capsule owner(memory.get(), [](void* p) { delete static_cast<cpu::Buffer*>(p); });
  memory.release();
  return py::array_t<T>(shape, data, owner);
}

template <class T>
T* output(py::object& to, Shape shape, bool on_line = false) {
  py::array_t<T> a = empty<T>(shape, on_line);
  T* data = a.mutable_data();
  to = std::move(a);
  return data;
}

// Weights of a layer, in the order of fusedrnn.backends.protocol.Weights, and what a gradient is asked for: these, x
// and the initial state.
constexpr int kWeights = 8, kNeeds = kWeights + 2;

int gates_of(CellId cell) { return cpu::kernels<float>().shape[int(cell)].gates; }
bool has_c(CellId cell) { return cpu::kernels<float>().shape[int(cell)].has_c; }

bool layer_norm(CellId cell) { return cpu::kernels<float>().shape[int(cell)].layer_norm; }

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

struct PyPacked {
  CellId cell;
  Index I, H, P;
  py::object weights[kWeights];
  PackedPtr<float> f32;
  PackedPtr<double> f64;
  const PackedWeights<float>* get(float) const { return f32.get(); }
  const PackedWeights<double>* get(double) const { return f64.get(); }
};

// Lengths and resets are copied: what backward walks by must be what forward walked by, whatever becomes of the
// caller's.
struct PyTape {
  Problem problem;
  std::vector<Index> lengths;
  std::vector<unsigned char> reset;
  py::object x, y, h0, c0, weights[kWeights];
  py::object packed = py::none();  // kept for boundary states only, which run forward again
  py::object saved = py::none();   // the memory of a tape that lies in an array
  TapePtr<float> f32;
  TapePtr<double> f64;
  const Tape<float>* get(float) const { return f32.get(); }
  const Tape<double>* get(double) const { return f64.get(); }
  TapePtr<float>& slot(float) { return f32; }
  TapePtr<double>& slot(double) { return f64; }
};

// fusedrnn.backends.protocol.Regularization: the rates, the seed (None: evaluation) and the stream; or None.
using PyRegularization = std::optional<std::tuple<double, double, double, std::optional<std::uint64_t>, std::uint32_t>>;

Regularization regularization_of(const PyRegularization& given, CellId cell) {
  if (!given) return {};
  const auto& [recurrent_dropout, zoneout_h, zoneout_c, seed, stream] = *given;
  for (const double rate : {recurrent_dropout, zoneout_h, zoneout_c})
    if (!(rate >= 0 && rate <= 1))
      throw RefusedValue("regularization: expected rates from 0 to 1, got " + std::to_string(rate));
  if (zoneout_c > 0 && !has_c(cell)) throw RefusedValue("zoneout_c: expected 0 for a cell without c");
  return {recurrent_dropout, zoneout_h, zoneout_c, seed.has_value(), seed.value_or(0), stream};
}

void set_rows(PyTape& tape, const py::object& lengths, const py::object& reset) {
  const Index time = tape.problem.sizes.T, B = tape.problem.sizes.B;
  if (!lengths.is_none()) {
    const Index* data = need<Index>(lengths, "lengths", {B});
    tape.lengths.assign(data, data + B);
    for (Index n : tape.lengths)
      if (n < 0 || n > time)
        throw RefusedValue("lengths: expected 0 to T = " + std::to_string(time) + ", got " + std::to_string(n));
    tape.problem.lengths = tape.lengths.data();
  }
  if (!reset.is_none()) {
    const bool* data = need<bool>(reset, "reset", {time, B});
    tape.reset.assign(data, data + time * B);
    for (unsigned char& r : tape.reset) r = r != 0;
    tape.problem.reset = tape.reset.data();
  }
}

template <class T>
Weights<const T> weights_of(const py::object* w, CellId cell, Index I, Index H, Index P) {
  const Index rows = gates_of(cell) * H;
  Weights<const T> weights = {need<T>(w[0], "weight_ih", {rows, I}), need<T>(w[1], "weight_hh", {rows, P}),
                              maybe<T>(w[2], "bias_ih", {rows}), maybe<T>(w[3], "bias_hh", {rows})};
  const T** to[] = {&weights.gain_ih, &weights.gain_hh, &weights.gain_c, &weights.bias_c};
  const char* names[] = {"gain_ih", "gain_hh", "gain_c", "bias_c"};
  for (int i = 0; i < 4; ++i) {
    if (layer_norm(cell) && (i < 2 || has_c(cell)))
      *to[i] = need<T>(w[4 + i], names[i], {i < 2 ? rows : H});
    else if (!w[4 + i].is_none())
      throw RefusedValue(std::string(names[i]) + ": expected None for this cell");
  }
  return weights;
}

template <class T>
std::unique_ptr<PyPacked> pack_as(CellId cell, const py::object* w) {
  const py::array ih = py::reinterpret_borrow<py::array>(w[0]), hh = py::reinterpret_borrow<py::array>(w[1]);
  const Index G = gates_of(cell), I = ih.shape(1), P = hh.shape(1), H = ih.shape(0) / G;
  if (I == 0 || H == 0) throw py::value_error("weight_ih: expected (G*H, I), H and I at least 1, got " + text(ih));
  if (P != H)
    throw py::value_error("weight_hh: expected (G*H, H), got " + text(hh) +
                          "; a projected size P != H is not supported yet");
  auto packed = std::make_unique<PyPacked>();
  packed->cell = cell, packed->I = I, packed->H = H, packed->P = P;
  for (int i = 0; i < kWeights; ++i) packed->weights[i] = w[i];
  const Weights<const T> view = weights_of<T>(w, cell, I, H, P);
  PackedPtr<T> result = without_gil([&] { return pack<T>(cell, I, H, P, view, signals()); });
  if constexpr (sizeof(T) == 4)
    packed->f32 = std::move(result);
  else
    packed->f64 = std::move(result);
  return packed;
}

bool is_float32(const py::object& o, const char* name, int ndim) {
  if (!is_array(o))
    throw RefusedType(std::string(name) + ": expected an array, got " + py::str(py::type::of(o)).cast<std::string>());
  const py::array a = py::reinterpret_borrow<py::array>(o);
  if (a.ndim() != ndim)
    throw RefusedValue(std::string(name) + ": expected " + std::to_string(ndim) + " axes, got " + text(a));
  if (a.dtype().equal(py::dtype::of<float>())) return true;
  if (a.dtype().equal(py::dtype::of<double>())) return false;
  throw RefusedType(std::string(name) + ": expected float32 or float64, got " + text(a));
}

std::unique_ptr<PyPacked> py_pack(int id, py::object weight_ih, py::object weight_hh, py::object bias_ih,
                                  py::object bias_hh, py::object gain_ih, py::object gain_hh, py::object gain_c,
                                  py::object bias_c) {
  const CellId cell = cell_of(id);
  const bool f32 = is_float32(weight_ih, "weight_ih", 2);
  is_float32(weight_hh, "weight_hh", 2);
  const py::object w[kWeights] = {weight_ih, weight_hh, bias_ih, bias_hh, gain_ih, gain_hh, gain_c, bias_c};
  return f32 ? pack_as<float>(cell, w) : pack_as<double>(cell, w);
}

// One forward call: checked, its outputs allocated, nothing run yet.
template <class T>
struct ForwardSetup {
  ForwardCall<T> call{};
  std::unique_ptr<PyTape> tape = std::make_unique<PyTape>();  // owns the lengths and resets that `call` points to
  py::object y, hT, cT = py::none(), h_states = py::none(), c_states = py::none(), saved = py::none();

  ForwardSetup(const PyPacked& packed, const py::object& x, const py::object& h0, const py::object& c0,
               const py::object& lengths, const py::object& reset, bool reverse, bool return_states, Save save,
               Index detach_every, bool array_tape = false, const PyRegularization& regularization = {}) {
    const py::array array = py::reinterpret_borrow<py::array>(x);
    const Index time = array.shape(0), B = array.shape(1), I = packed.I, H = packed.H, P = packed.P;
    const bool c = has_c(packed.cell);
    tape->problem = {packed.cell,
                     {time, B, I, H, P},
                     nullptr,
                     nullptr,
                     reverse,
                     detach_every,
                     regularization_of(regularization, packed.cell)};
    if (detach_every < 0)
      throw RefusedValue("detach_every: expected 1 or more, or none, got " + std::to_string(detach_every));
    set_rows(*tape, lengths, reset);
    call.problem = tape->problem;
    call.packed = packed.get(T());
    if (!call.packed) throw RefusedType("x: expected the dtype of the weights, got " + text(array));
    call.x = sequence<T>(x, "x", {time, B, I});
    call.h0 = maybe<T>(h0, "h0", {B, P});
    if (c) call.c0 = maybe<T>(c0, "c0", {B, H});
    call.save = save;
    call.poll = signals();
    call.y = output<T>(y, {time, B, P});
    call.hT = output<T>(hT, {B, P});
    if (c) call.cT = output<T>(cT, {B, H});
    if (return_states) call.h_states = output<T>(h_states, {time, B, P});
    if (return_states && c) call.c_states = output<T>(c_states, {time, B, H});
    if (array_tape) {  // what ragged rows leave of it is 0, so that it is the same for the same inputs
      const Index width = tape_width(packed.cell, H, tape->problem.regularization.acts());
      call.saved = output<T>(saved, {time, B, width}, true);
      Index rows = time * B;
      if (!tape->lengths.empty()) rows = std::accumulate(tape->lengths.begin(), tape->lengths.end(), Index(0));
      std::fill(call.saved + rows * width, call.saved + time * B * width, T(0));
    }
  }
};

template <class T>
py::tuple forward_as(const py::object& packed_object, const py::object& x, const py::object& h0, const py::object& c0,
                     const py::object& lengths, const py::object& reset, bool reverse, bool return_states, Save save,
                     Index detach_every, bool array_tape, const PyRegularization& regularization) {
  const PyPacked& packed = packed_object.cast<const PyPacked&>();
  ForwardSetup<T> setup(packed, x, h0, c0, lengths, reset, reverse, return_states, save, detach_every, array_tape,
                        regularization);
  setup.tape->slot(T()) = without_gil([&] { return forward<T>(setup.call); });
  py::object kept = setup.saved;
  if (save != Save::nothing && !array_tape) {
    PyTape& tape = *setup.tape;
    if (save == Save::boundary_states) tape.packed = packed_object;
    tape.x = x, tape.y = setup.y, tape.h0 = h0, tape.c0 = c0;
    for (int i = 0; i < kWeights; ++i) tape.weights[i] = packed.weights[i];
    kept = py::cast(std::move(setup.tape));
  }
  return py::make_tuple(setup.y, setup.hT, setup.cT, setup.h_states, setup.c_states, kept);
}

py::tuple py_forward(const py::object& packed, const py::object& x, const py::object& h0, const py::object& c0,
                     const py::object& lengths, const py::object& reset, bool reverse, bool return_states, int save_id,
                     Index detach_every, const PyRegularization& regularization) {
  if (!py::isinstance<PyPacked>(packed))
    throw py::type_error("packed: expected what pack returned, got " +
                         py::str(py::type::of(packed)).cast<std::string>());
  if (save_id < 0 || save_id > 3)
    throw py::value_error("save: expected 0 (nothing), 1 (all), 2 (boundary states) or 3 (all, in an array), got " +
                          std::to_string(save_id));
  const bool array_tape = save_id == 3;
  const Save save = array_tape ? Save::all : Save(save_id);
  return (is_float32(x, "x", 3) ? forward_as<float> : forward_as<double>)(packed, x, h0, c0, lengths, reset, reverse,
                                                                          return_states, save, detach_every, array_tape,
                                                                          regularization);
}

// The tape of a forward call with save 3, made again of its array and of what forward got and gave. Arrays of the
// wrong shapes are refused by backward.
template <class T>
std::unique_ptr<PyTape> tape_as(CellId cell, const py::array& saved, const py::array& x, const py::array& weight_ih,
                                const py::object& lengths, const py::object& reset, bool reverse, Index detach_every,
                                const PyRegularization& regularization) {
  const Index G = gates_of(cell), time = x.shape(0), B = x.shape(1), I = x.shape(2), H = weight_ih.shape(0) / G;
  if (I == 0 || H == 0) throw RefusedValue("weight_ih: expected (G*H, I), H and I at least 1, got " + text(weight_ih));
  auto tape = std::make_unique<PyTape>();
  tape->problem = {
      cell, {time, B, I, H, H}, nullptr, nullptr, reverse, detach_every, regularization_of(regularization, cell)};
  set_rows(*tape, lengths, reset);
  const Index width = tape_width(cell, H, tape->problem.regularization.acts());
  const T* memory = need<T>(saved, "saved", {time, B, width});
  tape->slot(T()) = tape_over<T>(tape->problem, memory);
  return tape;
}

std::unique_ptr<PyTape> py_tape(int id, py::object saved, py::object x, py::object y, py::object h0, py::object c0,
                                py::object weight_ih, py::object weight_hh, py::object bias_ih, py::object bias_hh,
                                py::object gain_ih, py::object gain_hh, py::object gain_c, py::object bias_c,
                                const py::object& lengths, const py::object& reset, bool reverse, Index detach_every,
                                const PyRegularization& regularization) {
  const CellId cell = cell_of(id);
  const bool f32 = is_float32(x, "x", 3);
  is_float32(weight_ih, "weight_ih", 2);
  is_float32(saved, "saved", 3);
  std::unique_ptr<PyTape> tape = (f32 ? tape_as<float> : tape_as<double>)(cell, saved, x, weight_ih, lengths, reset,
                                                                          reverse, detach_every, regularization);
  tape->x = x, tape->y = y, tape->h0 = h0, tape->c0 = c0, tape->saved = saved;
  const py::object w[kWeights] = {weight_ih, weight_hh, bias_ih, bias_hh, gain_ih, gain_hh, gain_c, bias_c};
  for (int i = 0; i < kWeights; ++i) tape->weights[i] = w[i];
  return tape;
}

// One backward call: checked, its outputs allocated, nothing run yet.
template <class T>
struct BackwardSetup {
  BackwardCall<T> call{};
  py::object dx = py::none(), w[kWeights], dh0 = py::none(), dc0 = py::none();

  BackwardSetup(const PyTape& tape, const py::object& dy, const py::object& dhT, const py::object& dcT,
                const py::object& dh_states, const py::object& dc_states, const std::vector<bool>& need_of) {
    const Sizes& n = tape.problem.sizes;
    const Index rows = gates_of(tape.problem.cell) * n.H;
    const bool c = has_c(tape.problem.cell);
    call.problem = tape.problem;
    call.tape = tape.get(T());
    call.weights = weights_of<T>(tape.weights, tape.problem.cell, n.I, n.H, n.P);
    call.x = sequence<T>(tape.x, "x", {n.T, n.B, n.I});
    if (!tape.packed.is_none()) call.packed = tape.packed.cast<const PyPacked&>().get(T());
    call.y = need<T>(tape.y, "y", {n.T, n.B, n.P});
    call.h0 = maybe<T>(tape.h0, "h0", {n.B, n.P});
    if (c) call.c0 = maybe<T>(tape.c0, "c0", {n.B, n.H});
    call.dy = sequence<T>(dy, "dy", {n.T, n.B, n.P});
    call.dhT = maybe<T>(dhT, "dhT", {n.B, n.P});
    call.dh_states = sequence<T>(dh_states, "dh_states", {n.T, n.B, n.P});
    if (c) {
      call.dcT = maybe<T>(dcT, "dcT", {n.B, n.H});
      call.dc_states = sequence<T>(dc_states, "dc_states", {n.T, n.B, n.H});
    }
    call.poll = signals();
    std::fill(w, w + kWeights, py::none());
    if (need_of[0]) call.dx = output<T>(dx, {n.T, n.B, n.I});
    if (need_of[1]) call.dweights.weight_ih = output<T>(w[0], {rows, n.I});
    if (need_of[2]) call.dweights.weight_hh = output<T>(w[1], {rows, n.P});
    if (need_of[3] && !tape.weights[2].is_none()) call.dweights.bias_ih = output<T>(w[2], {rows});
    if (need_of[4] && !tape.weights[3].is_none()) call.dweights.bias_hh = output<T>(w[3], {rows});
    if (layer_norm(tape.problem.cell)) {
      if (need_of[5]) call.dweights.gain_ih = output<T>(w[4], {rows});
      if (need_of[6]) call.dweights.gain_hh = output<T>(w[5], {rows});
      if (need_of[7] && c) call.dweights.gain_c = output<T>(w[6], {n.H});
      if (need_of[8] && c) call.dweights.bias_c = output<T>(w[7], {n.H});
    }
    if (need_of[kNeeds - 1]) call.dh0 = output<T>(dh0, {n.B, n.P});
    if (need_of[kNeeds - 1] && c) call.dc0 = output<T>(dc0, {n.B, n.H});
  }
};

template <class T>
py::tuple backward_as(const PyTape& tape, const py::object& dy, const py::object& dhT, const py::object& dcT,
                      const py::object& dh_states, const py::object& dc_states, const std::vector<bool>& need_of) {
  BackwardSetup<T> setup(tape, dy, dhT, dcT, dh_states, dc_states, need_of);
  without_gil([&] {
    backward<T>(setup.call);
    return 0;
  });
  const py::object* w = setup.w;
  return py::make_tuple(setup.dx, w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], setup.dh0, setup.dc0);
}

py::tuple py_backward(const PyTape& tape, const py::object& dy, const py::object& dhT, const py::object& dcT,
                      const py::object& dh_states, const py::object& dc_states, const std::vector<bool>& need_of) {
  if (need_of.size() != kNeeds)
    throw py::value_error("need: expected " + std::to_string(kNeeds) + " flags, got " + std::to_string(need_of.size()));
  return tape.f32 ? backward_as<float>(tape, dy, dhT, dcT, dh_states, dc_states, need_of)
                  : backward_as<double>(tape, dy, dhT, dcT, dh_states, dc_states, need_of);
}

// The arithmetic of a call, for bench/call_overhead.py: `times` times the kernels' own call, as the binding makes it.
// As with a caller that carries a state, the results of one call live until the next has run: two sets of outputs take
// turns, and what forward saves is allocated and freed every time.
template <class T>
void repeat_forward_as(Index times, const PyPacked& packed, const py::object& x, const py::object& h0,
                       const py::object& c0, Save save) {
  const py::object none = py::none();
  const ForwardSetup<T> even(packed, x, h0, c0, none, none, false, false, save, 0),
      odd(packed, x, h0, c0, none, none, false, false, save, 0);
  without_gil([&] {
    TapePtr<T> last;
    for (Index i = 0; i < times; ++i) last = forward<T>(i % 2 ? odd.call : even.call);
    return 0;
  });
}

template <class T>
void repeat_backward_as(Index times, const PyTape& tape, const py::object& dy) {
  const py::object none = py::none();
  const std::vector<bool> all(kNeeds, true);
  const BackwardSetup<T> even(tape, dy, none, none, none, none, all), odd(tape, dy, none, none, none, none, all);
  without_gil([&] {
    for (Index i = 0; i < times; ++i) backward<T>(i % 2 ? odd.call : even.call);
    return 0;
  });
}

template <class T>
py::array_t<T> activation_as(int which, const py::object& x, const std::string& isa) {
  const py::array a = py::reinterpret_borrow<py::array>(x);
  const T* in = need<T>(x, "x", {a.size()});
  py::array_t<T> out(std::vector<Index>{a.size()});
  const cpu::Kernels<T>* kernels = &cpu::kernels<T>();
  if (!isa.empty()) {
    kernels = nullptr;
    for (cpu::Isa level : cpu::all_isas)
      if (isa == cpu::name(level) && cpu::available(level)) kernels = cpu::kernels_of<T>(level);
    if (!kernels) throw py::value_error("isa: not available here: " + isa);
  }
  const cpu::ControlWord word;
  kernels->activation(which, in, out.mutable_data(), a.size());
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
  return d;
}

// Threads, whether by rows of the batch, and backward's chunks of steps: for docs/scaling.md, in float32.
py::tuple split(int id, Index T, Index B, Index I, Index H, int threads) {
  const CellId cell = cell_of(id);
  if (T < 0 || B < 0 || I < 1 || H < 1 || threads < 1)
    throw py::value_error("expected T and B at least 0, I, H and threads at least 1");
  const auto size = [](Index n) { return std::size_t(n) + 16; };
  cpu::checked_product({size(T), size(B), size(H), size(I) + size(H), 64});  // beyond what the choice itself multiplies
  const Sizes sizes = {T, B, I, H, H};
  const Split found = split_of<float>(cell, sizes, threads);
  return py::make_tuple(found.threads, found.by_rows, chunks_of<float>(cell, sizes));
}

unsigned long control_word() {
#if defined(__x86_64__)
  return _mm_getcsr();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled kernels of fusedrnn. Use fusedrnn.kernels; this module checks only what memory safety needs.";
  py::class_<PyPacked>(m, "Packed", "Weights in the kernels' own order.");
  py::class_<PyTape>(m, "Tape", "What forward saved for backward.")
      .def_property_readonly("bytes", [](const PyTape& t) { return t.f32 ? tape_bytes(*t.f32) : tape_bytes(*t.f64); })
      .def_property_readonly("sizes", [](const PyTape& t) {
        const Sizes& n = t.problem.sizes;
        return py::make_tuple(n.T, n.B, n.I, n.H, n.P);
      });
  array_type = reinterpret_cast<PyTypeObject*>(py::module_::import("numpy").attr("ndarray").ptr());  // never freed
  py::register_exception<RefusedType>(m, "RefusedType", PyExc_TypeError);
  py::register_exception<RefusedValue>(m, "RefusedValue", PyExc_ValueError);
  py::list cells;
#define X(id, type) cells.append(#id);
#include "cells/cells.def"
#undef X
  m.attr("CELLS") = py::tuple(cells);
  m.def("pack", &py_pack, py::arg("cell"), py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"),
        py::arg("bias_hh"), py::arg("gain_ih") = py::none(), py::arg("gain_hh") = py::none(),
        py::arg("gain_c") = py::none(), py::arg("bias_c") = py::none());
  m.def("forward", &py_forward, py::arg("packed"), py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("lengths"),
        py::arg("reset"), py::arg("reverse"), py::arg("return_states"), py::arg("save"), py::arg("detach_every") = 0,
        py::arg("regularization") = py::none());
  m.def("tape", &py_tape, py::arg("cell"), py::arg("saved"), py::arg("x"), py::arg("y"), py::arg("h0"), py::arg("c0"),
        py::arg("weight_ih"), py::arg("weight_hh"), py::arg("bias_ih"), py::arg("bias_hh"), py::arg("gain_ih"),
        py::arg("gain_hh"), py::arg("gain_c"), py::arg("bias_c"), py::arg("lengths"), py::arg("reset"),
        py::arg("reverse"), py::arg("detach_every") = 0, py::arg("regularization") = py::none());
  m.def(
      "tape_width", [](int cell, Index H, bool regularized) { return tape_width(cell_of(cell), H, regularized); },
      py::arg("cell"), py::arg("H"), py::arg("regularized") = false);
  m.def("backward", &py_backward, py::arg("tape"), py::arg("dy"), py::arg("dhT"), py::arg("dcT"), py::arg("dh_states"),
        py::arg("dc_states"), py::arg("need"));
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
      [](Index times, const PyPacked& packed, const py::object& x, const py::object& h0, const py::object& c0,
         bool save) {
        const Save kept = save ? Save::all : Save::nothing;
        is_float32(x, "x", 3) ? repeat_forward_as<float>(times, packed, x, h0, c0, kept)
                              : repeat_forward_as<double>(times, packed, x, h0, c0, kept);
      },
      py::arg("times"), py::arg("packed"), py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("save"));
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
  testing.def("poison", &cpu::poison, py::arg("on"));
  testing.def("fail_allocation_after", &cpu::fail_allocation_after, py::arg("count"));
  testing.def("arena", [] {
    const cpu::ArenaUse use = cpu::arena_use();
    return py::make_tuple(use.live, use.cached, use.limit);
  });
  testing.def("trim_arena", &cpu::trim_arena);
}
