// The arrays of a call: NumPy's, and tensors that give their memory by DLPack. SPDX-License-Identifier: Apache-2.0
//
// No copies: an array that a kernel cannot take as it is gets refused.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "api.h"
#include "cpu/arena.h"

namespace fusedrnn {

namespace py = pybind11;

using Shape = std::initializer_list<Index>;  // without a vector's memory: many are made in every call

inline std::string text(const std::vector<Index>& shape) {
  std::string s = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + (shape.size() == 1 ? ",)" : ")");
}

// An argument that a kernel cannot take as it is; in Python RefusedType, a TypeError, and RefusedValue, a ValueError.
// Classes of their own, so that fusedrnn.backends.cpu can tell them from what a signal handler raises.
struct RefusedType : py::type_error {
  using py::type_error::type_error;
};
struct RefusedValue : py::value_error {
  using py::value_error::value_error;
};

// The part of dlpack.h (https://dmlc.github.io/dlpack, version 1) that is used here.
namespace dlpack {
enum Code : std::uint8_t { kInt = 0, kFloat = 2, kBool = 6 };
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  std::int32_t device_type, device_id;  // type 1: CPU
  std::int32_t ndim;
  DataType dtype;
  std::int64_t *shape, *strides;  // in elements; null strides: contiguous
  std::uint64_t byte_offset;
};
struct ExchangeApi {
  std::uint32_t major, minor;
  void *previous, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // a view that lives as long as the object is left alone
  void* current_stream;
};
}  // namespace dlpack

// Which objects are arrays: of exactly these types, since a subclass may mean more than its data says, as masked arrays
// do.
struct ArrayTypes {
  PyTypeObject* numpy = nullptr;                         // numpy.ndarray
  PyTypeObject* tensors[2] = {};                         // torch.Tensor and torch.nn.Parameter, once `api` is set
  std::atomic<const dlpack::ExchangeApi*> api{nullptr};  // theirs; set while other threads may be in a call
  bool tensor(PyTypeObject* type) const { return api && (type == tensors[0] || type == tensors[1]); }
};
inline ArrayTypes array_types;

template <class T>
constexpr dlpack::DataType kDataType = {std::is_same_v<T, bool> ? dlpack::kBool
                                        : std::is_integral_v<T> ? dlpack::kInt
                                                                : dlpack::kFloat,
                                        8 * sizeof(T), 1};

// What a check looks at; of arrays of more than kAxes axes the shape alone.
struct View {
  static constexpr int kAxes = 3;
  const void* data = nullptr;
  Index ndim = 0;
  const Index* shape = nullptr;
  Index strides[kAxes] = {};  // in bytes
  dlpack::DataType tensor_type = {};
  py::object numpy_type;  // of NumPy's, which have no tensor_type

  std::vector<Index> sizes() const { return {shape, shape + ndim}; }
  template <class T>
  bool is() const {
    constexpr dlpack::DataType type = kDataType<T>;
    if (!numpy_type)
      return tensor_type.code == type.code && tensor_type.bits == type.bits && tensor_type.lanes == type.lanes;
    return numpy_type.is(py::dtype::of<T>()) || py::reinterpret_borrow<py::dtype>(numpy_type).equal(py::dtype::of<T>());
  }
  std::string text() const {
    if (numpy_type) return py::str(numpy_type).cast<std::string>() + " " + fusedrnn::text(sizes());
    static const char* const kinds[] = {"int", "uint", "float", "", "bfloat", "complex", "bool"};  // DLPack's codes
    const std::string kind = tensor_type.code < 7 ? kinds[tensor_type.code] : "";
    return kind + std::to_string(tensor_type.bits) + " " + fusedrnn::text(sizes());
  }
};

// False where the object is no array; an array is not checked further.
inline bool view_of(const py::object& o, View& view) {
  PyTypeObject* const type = Py_TYPE(o.ptr());
  if (type == array_types.numpy) {
    const py::array a = py::reinterpret_borrow<py::array>(o);
    static_assert(sizeof(py::ssize_t) == sizeof(Index), "on macOS a long beside a long long");
    view.data = a.data(), view.ndim = a.ndim(), view.shape = reinterpret_cast<const Index*>(a.shape());
    view.numpy_type = a.dtype();
    for (Index i = 0; i < std::min<Index>(a.ndim(), View::kAxes); ++i) view.strides[i] = a.strides(i);
    return true;
  }
  if (!array_types.tensor(type)) return false;
  dlpack::Tensor t;
  if (array_types.api.load()->tensor_from_object(o.ptr(), &t)) throw RefusedType(py::error_already_set().what());
  if (t.device_type != 1) throw RefusedType("expected a tensor on the CPU");
  view.data = static_cast<const char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim, view.shape = t.shape, view.tensor_type = t.dtype;
  Index step = t.dtype.bits / 8;
  for (Index i = t.ndim - 1; i >= 0; --i) {
    if (i < View::kAxes) view.strides[i] = t.strides ? t.strides[i] * (t.dtype.bits / 8) : step;
    step *= t.shape[i];
  }
  return true;
}

inline std::string type_name(const py::object& o) { return py::str(py::type::of(o)).cast<std::string>(); }

// The view of what has to be an array.
inline View array_view(const py::object& o, const char* name) {
  View a;
  if (!view_of(o, a)) throw RefusedType(std::string(name) + ": expected an array, got " + type_name(o));
  return a;
}

// The array's data, if it is T in native byte order, aligned, of this shape and, from axis `strided` on, contiguous.
// Axes before `strided` may have any stride; `strides` gets theirs, in elements.
template <class T>
const T* need(const py::object& o, const char* name, Shape shape, int strided = 0, Index* strides = nullptr) {
  static_assert(sizeof(T) <= 8);
  const auto expected = [&] {  // made only when it is needed: NumPy is slow at naming a dtype
    return name + (": expected " + py::str(py::dtype::of<T>()).cast<std::string>() + " ") + text(shape) + ", got ";
  };
  View a;
  if (!view_of(o, a)) throw RefusedType(expected() + type_name(o));
  if (!a.is<T>()) throw RefusedType(expected() + a.text());
  const Index* expects = shape.begin();
  bool same = a.ndim == Index(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = a.shape[i] == expects[i];
  if (!same) throw RefusedValue(expected() + a.text());
  const bool some = std::find(expects, expects + shape.size(), 0) == expects + shape.size();
  bool contiguous = reinterpret_cast<std::uintptr_t>(a.data) % alignof(T) == 0 && (a.data || !some);
  Index step = sizeof(T);
  for (Index i = Index(shape.size()) - 1; i >= strided; --i) {
    if (expects[i] > 1 && some && a.strides[i] != step) contiguous = false;
    step *= expects[i];
  }
  for (Index i = 0; i < strided; ++i) {
    contiguous = contiguous && a.strides[i] % Index(sizeof(T)) == 0;
    if (strides) strides[i] = a.strides[i] / Index(sizeof(T));
  }
  if (!contiguous) throw RefusedValue(expected() + a.text() + ", not aligned or not contiguous in memory");
  return static_cast<const T*>(a.data);
}

template <class T>
const T* maybe(const py::object& o, const char* name, Shape shape) {
  return o.is_none() ? nullptr : need<T>(o, name, shape);
}

// Over time (T, B, n), or of one step (B, n).
template <class T>
Sequence<const T> sequence(const py::object& o, const char* name, Shape shape) {
  if (o.is_none()) return {};
  Index strides[2] = {};
  const int before = int(shape.size()) - 1;
  const T* data = need<T>(o, name, shape, before, strides + 2 - before);
  return {data, strides[0], strides[1]};
}

// A new array. Large ones come from the kernels' own recycled memory: fresh pages would cost as much as filling them.
template <class T>
py::array_t<T> empty(Shape shape) {
  std::size_t bytes = sizeof(T);
  for (Index n : shape) bytes = cpu::checked_product({bytes, std::size_t(n)});
  if (bytes < (std::size_t(1) << 16)) return py::array_t<T>(shape);
  auto memory = std::make_unique<cpu::Buffer>(bytes);
  T* data = memory->as<T>();
  const py::capsule owner(memory.get(), [](void* p) { delete static_cast<cpu::Buffer*>(p); });
  memory.release();
  return py::array_t<T>(shape, data, owner);
}

inline void need_writeable(const py::object& o, const char* name) {
  if (Py_TYPE(o.ptr()) == array_types.numpy && !py::reinterpret_borrow<py::array>(o).writeable())
    throw RefusedValue(std::string(name) + ": expected an array that can be written to, got a read-only one");
}

// The memory of an output: of the array that the caller gave, None where it is not wanted; where none was given, of a
// new one.
template <class T>
T* output(py::object& to, const char* name, Shape shape) {
  if (to) {
    need_writeable(to, name);
    return const_cast<T*>(maybe<T>(to, name, shape));
  }
  py::array_t<T> a = empty<T>(shape);
  T* data = a.mutable_data();
  to = std::move(a);
  return data;
}

}  // namespace fusedrnn
