// Values as JSON that keeps their kind: names are strings, sequences and tuples lists, a set is
// {"set": [...]}, a function or record {"map": [[key, value], ...]}.
#pragma once

#include <string>

#include "values.hpp"

namespace tokenspeed::checker {

template <class Model>
void show(std::string& out, bool v) {
  out += v ? "true" : "false";
}
template <class Model>
void show(std::string& out, int v) {
  out += std::to_string(v);
}
template <class Model, int N, int Id>
void show(std::string& out, Atom<N, Id> v) {
  out += '"';
  out += Model::kAtomNames[static_cast<std::size_t>(Id)][v.v];
  out += '"';
}
template <class Model, class T, int N>
void show(std::string& out, const Set<T, N>& v);
template <class Model, class T, int N>
void show(std::string& out, const Seq<T, N>& v);
template <class Model, class D, class T>
void show(std::string& out, const Fn<D, T>& v);
template <class Model, Struct T>
void show(std::string& out, const T& v);

template <class Model, class T, int N>
void show(std::string& out, const Set<T, N>& v) {
  out += "{\"set\": [";
  bool comma = false;
  v.each([&](int at) {
    if (comma) out += ", ";
    comma = true;
    show<Model>(out, Rank<T>::at(at));
  });
  out += "]}";
}
template <class Model, class T, int N>
void show(std::string& out, const Seq<T, N>& v) {
  out += "[";
  for (std::size_t i = 0; i < v.n; ++i) {
    if (i) out += ", ";
    show<Model>(out, v.items[i]);
  }
  out += "]";
}
template <class Model, class D, class T>
void show(std::string& out, const Fn<D, T>& v) {
  out += "{\"map\": [";
  for (int i = 0; i < D::n; ++i) {
    out += i ? ", [" : "[";
    show<Model>(out, Rank<typename D::Key>::at(D::rank(i)));
    out += ", ";
    show<Model>(out, v[i]);
    out += "]";
  }
  out += "]}";
}
template <class Model, Struct T>
void show(std::string& out, const T& v) {
  bool comma = false;
  out += T::kRecord ? "{\"map\": [" : "[";
  const auto one = [&](auto field, std::size_t at) {
    if (comma) out += ", ";
    comma = true;
    if (T::kRecord) out += std::string("[\"") + T::kFieldNames[at] + "\", ";
    show<Model>(out, v.*field);
    if (T::kRecord) out += "]";
  };
  each_member(v, [&](auto field) { one(field, place<T>(field)); });
  out += T::kRecord ? "]}" : "]";
}

}  // namespace tokenspeed::checker
