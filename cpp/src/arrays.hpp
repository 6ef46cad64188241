// numpy arrays in and out, at the price of the array itself. Rule: nothing is copied that need not
// be. A small step is mostly calls, and pybind11's property, `array_t` and its caster each cost as
// much as what they wrap, so that what every step passes goes around them here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>
#include <vector>

namespace tokenspeed::arrays {

namespace py = pybind11;

// A view of a vector that keeps the vector's owner alive; with columns, of as many rows of them.
template <class Out, class In>
PyObject* view(const std::vector<In>& data, PyObject* owner, py::ssize_t columns) {
  static_assert(sizeof(Out) == sizeof(In));
  using Api = py::detail::npy_api;
  constexpr int kFlags =
      Api::NPY_ARRAY_C_CONTIGUOUS_ | Api::NPY_ARRAY_ALIGNED_ | Api::NPY_ARRAY_WRITEABLE_;
  Api& api = Api::get();
  const auto size = static_cast<py::ssize_t>(data.size());
  const Py_intptr_t shape[] = {columns > 0 ? size / columns : size, columns};
  PyObject* dtype = api.PyArray_DescrFromType_(py::detail::npy_format_descriptor<Out>::value);
  PyObject* array =
      api.PyArray_NewFromDescr_(api.PyArray_Type_, dtype, columns > 0 ? 2 : 1, shape, nullptr,
                                const_cast<In*>(data.data()), kFlags, nullptr);
  if (array == nullptr) return nullptr;
  Py_INCREF(owner);  // the array takes this reference over
  if (api.PyArray_SetBaseObject_(array, owner) == 0) return array;
  Py_DECREF(array);
  return nullptr;
}

// The value that an instance of a bound class holds; null, and a TypeError, if it holds none.
template <class T>
const T* held(PyObject* self) noexcept {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  void* value = instance->simple_layout ? instance->simple_value_holder[0]
                                        : instance->nonsimple.values_and_holders[0];
  if (value == nullptr) PyErr_SetString(PyExc_TypeError, "this object was never made");
  return static_cast<const T*>(value);
}

template <class T, auto member, class Out, int columns>
PyObject* get_view(PyObject* self, void*) noexcept {
  const T* value = held<T>(self);
  return value == nullptr ? nullptr : view<Out>(value->*member, self, columns);
}

template <class T, auto member>
PyObject* get_int(PyObject* self, void*) noexcept {
  const T* value = held<T>(self);
  return value == nullptr ? nullptr : PyLong_FromLongLong(value->*member);
}

// A read-only attribute; numpy and Python call its getter directly.
inline void attribute(py::handle type, const char* name, getter get) {
  auto* definition = new PyGetSetDef{name, get, nullptr, nullptr, nullptr};  // lives with the type
  auto* descriptor = PyDescr_NewGetSet(reinterpret_cast<PyTypeObject*>(type.ptr()), definition);
  if (descriptor == nullptr) throw py::error_already_set();
  type.attr(name) = py::reinterpret_steal<py::object>(descriptor);
}

template <class Out, auto member, int columns = 0, class T, class... Options>
void array(py::class_<T, Options...>& type, const char* name) {
  attribute(type, name, &get_view<T, member, Out, columns>);
}

template <auto member, class T, class... Options>
void number(py::class_<T, Options...>& type, const char* name) {
  attribute(type, name, &get_int<T, member>);
}

// An argument: any array, used as it is if its type and layout are right, else converted.
template <class Element>
class Input {
 public:
  template <class As = Element>
  std::span<const As> span() const noexcept {
    static_assert(sizeof(As) == sizeof(Element));
    return {static_cast<const As*>(array_.data()), static_cast<std::size_t>(array_.size())};
  }
  bool load(py::handle source) {
    if (usable(source)) {
      array_ = py::reinterpret_borrow<py::array>(source);
    } else {
      array_ = py::array_t<Element, py::array::c_style | py::array::forcecast>::ensure(source);
    }
    return static_cast<bool>(array_);
  }

 private:
  static bool usable(py::handle source) {
    using Api = py::detail::npy_api;
    if (!Api::get().PyArray_Check_(source.ptr())) return false;
    const auto array = py::reinterpret_borrow<py::array>(source);
    constexpr int kFlags = Api::NPY_ARRAY_C_CONTIGUOUS_ | Api::NPY_ARRAY_ALIGNED_;
    const py::dtype type = array.dtype();
    return type.num() == py::detail::npy_format_descriptor<Element>::value &&
           (type.byteorder() == '=' || type.byteorder() == '|') &&
           (array.flags() & kFlags) == kFlags;
  }
  // Of no type until `load`, and made without asking numpy for an empty one.
  py::array array_ = py::reinterpret_steal<py::array>(py::handle());
};

}  // namespace tokenspeed::arrays

namespace pybind11::detail {

template <class Element>
struct type_caster<tokenspeed::arrays::Input<Element>> {
  PYBIND11_TYPE_CASTER(tokenspeed::arrays::Input<Element>, const_name("numpy.ndarray"));
  bool load(handle source, bool) { return value.load(source); }
};

}  // namespace pybind11::detail
