// What every step passes between C++ and Python, at its own price. Rule: nothing is copied, and an
// array keeps what it shows. A small step is mostly calls; pybind11's instances, properties and
// arrays each cost several times what they wrap, so that plans and results go around them here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "recycler.hpp"

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

// A value as Python sees it: an object of two words, and getters that numpy and Python call
// directly. Python cannot make one.
template <class T>
struct Boxed {
  using Pointer = typename Recycler<T>::Pointer;
  PyObject_HEAD Pointer value;

  static inline PyTypeObject* type = nullptr;

  // `name` is dotted; the getters end with an empty one. Both live as long as the program.
  static void bind(py::module_& module, const char* name, const char* shown, PyGetSetDef* getters) {
    PyType_Slot slots[] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(&dealloc)}, {Py_tp_getset, getters}, {0, nullptr}};
    PyType_Spec spec{name, sizeof(Boxed), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                     slots};
    const auto made = py::reinterpret_steal<py::object>(PyType_FromSpec(&spec));
    if (!made) throw py::error_already_set();
    module.attr(shown) = made;
    type = reinterpret_cast<PyTypeObject*>(made.inc_ref().ptr());
  }

  static py::object box(Pointer value) {
    if (!value) return py::none();
    auto* self = reinterpret_cast<Boxed*>(type->tp_alloc(type, 0));
    if (self == nullptr) throw py::error_already_set();
    new (&self->value) Pointer(std::move(value));
    return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(self));
  }

  static const T& of(PyObject* self) noexcept { return *reinterpret_cast<Boxed*>(self)->value; }

  static void dealloc(PyObject* self) {
    PyTypeObject* mine = Py_TYPE(self);
    reinterpret_cast<Boxed*>(self)->value.~Pointer();
    mine->tp_free(self);
    Py_DECREF(mine);  // an object of a type that is made at run time holds it
  }

  template <auto member, class Out, int columns = 0>
  static constexpr PyGetSetDef array(const char* name) {
    return {name, [](PyObject* self, void*) { return view<Out>(of(self).*member, self, columns); },
            nullptr, nullptr, nullptr};
  }
  template <auto member>
  static constexpr PyGetSetDef number(const char* name) {
    return {name, [](PyObject* self, void*) { return PyLong_FromLongLong(of(self).*member); },
            nullptr, nullptr, nullptr};
  }
  // What `make` makes of the value, as Python's own objects.
  template <auto make>
  static constexpr PyGetSetDef object(const char* name) {
    return {name, &made<make>, nullptr, nullptr, nullptr};
  }
  template <auto make>
  static PyObject* made(PyObject* self, void*) {
    try {
      return make(of(self)).release().ptr();
    } catch (py::error_already_set& error) {  // Python's C code knows no exceptions
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    }
    return nullptr;
  }
};

// What an argument is called, for an error to name it.
template <std::size_t size>
struct Name {
  char text[size];
  consteval Name(const char (&from)[size]) { std::copy_n(from, size, text); }
};

[[noreturn]] inline void refuse_kind(const std::string& name, const std::string& given) {
  throw py::type_error(name + ": got " + given + "; expected integers, which nothing is cut to");
}
template <class T>
[[noreturn]] void refuse_size(const std::string& name, const std::string& given) {
  using Limits = std::numeric_limits<T>;
  throw py::value_error(name + ": got " + given + "; expected " + std::to_string(Limits::min()) +
                        " to " + std::to_string(Limits::max()));
}

// Any integer of Python's or numpy's, if T holds it; `too_large` is called with what T does not
// hold.
template <class T, class TooLarge>
T integer(const std::string& name, py::handle given, const TooLarge& too_large) {
  const auto whole = py::reinterpret_steal<py::object>(PyNumber_Index(given.ptr()));
  if (!whole) {
    PyErr_Clear();
    refuse_kind(name, std::string(py::str(given)) + ", a " + Py_TYPE(given.ptr())->tp_name);
  }
  int overflow = 0;
  const long long wide = PyLong_AsLongLongAndOverflow(whole.ptr(), &overflow);
  if (overflow != 0 || wide != static_cast<T>(wide)) too_large(std::string(py::str(whole)));
  return static_cast<T>(wide);
}

// An argument: an integer.
template <Name name, class T>
struct Whole {
  T value{};
  operator T() const noexcept { return value; }

  bool load(py::handle source) {
    value = integer<T>(name.text, source,
                       [](const std::string& given) { refuse_size<T>(name.text, given); });
    return true;
  }
};

// An argument: any array of whole numbers, used as it is if its type and layout are right, else
// converted.
template <Name name, class Element>
class Input {
 public:
  template <class As = Element>
  std::span<const As> span() const noexcept {
    static_assert(sizeof(As) == sizeof(Element));
    return {static_cast<const As*>(array_.data()), static_cast<std::size_t>(array_.size())};
  }
  bool load(py::handle source) {
    array_ = usable(source) ? py::reinterpret_borrow<py::array>(source) : converted(source);
    return true;
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

  // Through 64 bits, whose numbers tell whether fewer hold them.
  static py::array converted(py::handle source) {
    constexpr int kPlain = py::array::c_style | py::array::forcecast;
    const auto given = py::array::ensure(source);
    if (!given) refuse_kind(name.text, std::string("a ") + Py_TYPE(source.ptr())->tp_name);
    const char kind = given.dtype().kind();
    if (given.size() > 0 && kind != 'i' && kind != 'u' && kind != 'b') {
      refuse_kind(name.text, "an array of " + std::string(py::str(given.dtype())));
    }
    const py::array_t<std::int64_t, kPlain> wide(given);
    py::array_t<Element, kPlain> made(given);
    const auto same = [kind](std::int64_t whole, Element cut) {
      return whole == static_cast<std::int64_t>(cut) && (kind != 'u' || whole >= 0);
    };
    if (std::is_same_v<Element, bool>) return made;
    const std::int64_t* const end = wide.data() + wide.size();
    const std::int64_t* const cut = std::mismatch(wide.data(), end, made.data(), same).first;
    if (cut != end) {
      const auto place = " at index " + std::to_string(cut - wide.data());
      const auto large = static_cast<std::uint64_t>(*cut);
      refuse_size<Element>(name.text,
                           (kind == 'u' ? std::to_string(large) : std::to_string(*cut)) + place);
    }
    return made;
  }

  // Of no type until `load`, and made without asking numpy for an empty one.
  py::array array_ = py::reinterpret_steal<py::array>(py::handle());
};

}  // namespace tokenspeed::arrays

namespace pybind11::detail {

template <tokenspeed::arrays::Name of, class T>
struct type_caster<tokenspeed::arrays::Whole<of, T>> {
  using Self = tokenspeed::arrays::Whole<of, T>;
  PYBIND11_TYPE_CASTER(Self, const_name("int"));
  bool load(handle source, bool) { return value.load(source); }
};

template <tokenspeed::arrays::Name of, class Element>
struct type_caster<tokenspeed::arrays::Input<of, Element>> {
  using Self = tokenspeed::arrays::Input<of, Element>;
  PYBIND11_TYPE_CASTER(Self, const_name("numpy.ndarray"));
  bool load(handle source, bool) { return value.load(source); }
};

}  // namespace pybind11::detail
