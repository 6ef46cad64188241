// TLA+ values of finite types as plain C++ values. Rule: equal values have equal bits; every type
// can be packed into a fixed number of bits, and every type that is an element of a set has a rank.
//
//   BOOLEAN, numbers          bool, int
//   strings, model values     Atom<N, id>: one of N names
//   sets                      Set<T, N>: a bit for each of the N values that T has
//   sequences                 Seq<T, N>: at most N items
//   functions                 Fn<D, T>: an item for each key of the domain D
//   tuples, records           generated structs with `fields`, `kVariants` and `tag`
//
// Bounds that a specification does not state are tried: a value that does not fit raises Overflow,
// and the front end compiles again with a wider type.
#pragma once

#include <array>
#include <bit>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "model.hpp"

#ifndef TS_INT_LO
#define TS_INT_LO 0
#define TS_INT_HI 127
#define TS_SET_LO 0
#define TS_SET_HI 15
#endif

namespace tokenspeed::checker {

constexpr int bits_for(std::uint64_t values) {
  return values <= 1 ? 0 : std::bit_width(values - 1);
}

// --- types -------------------------------------------------------------------------------------

template <int N, int Id>
struct Atom {
  std::uint8_t v = 0;
  static_assert(N <= 256);
  friend constexpr bool operator==(Atom, Atom) = default;
};

template <class T>
struct Rank;  // card, of(value), at(rank)

template <class T, int N>
struct Set {
  static constexpr int kWords = (N + 63) / 64;
  std::array<std::uint64_t, static_cast<std::size_t>(kWords == 0 ? 1 : kWords)> w{};

  friend constexpr bool operator==(const Set&, const Set&) = default;
  constexpr bool has(int at) const {
    return (w[static_cast<std::size_t>(at >> 6)] >> (at & 63)) & 1;
  }
  constexpr void put(int at) {
    w[static_cast<std::size_t>(at >> 6)] |= std::uint64_t{1} << (at & 63);
  }
  constexpr Set with(int at) const {
    Set out = *this;
    out.put(at);
    return out;
  }
  bool contains(const T& value) const {
    const int at = Rank<T>::find(value);
    return at >= 0 && has(at);
  }
  void add(const T& value) { put(Rank<T>::of(value)); }
  constexpr int size() const {
    int n = 0;
    for (auto x : w) n += std::popcount(x);
    return n;
  }
  constexpr bool empty() const {
    for (auto x : w) {
      if (x) return false;
    }
    return true;
  }
  constexpr bool within(const Set& other) const {
    for (std::size_t i = 0; i < w.size(); ++i) {
      if (w[i] & ~other.w[i]) return false;
    }
    return true;
  }
  friend constexpr Set operator|(Set a, const Set& b) {
    for (std::size_t i = 0; i < a.w.size(); ++i) a.w[i] |= b.w[i];
    return a;
  }
  friend constexpr Set operator&(Set a, const Set& b) {
    for (std::size_t i = 0; i < a.w.size(); ++i) a.w[i] &= b.w[i];
    return a;
  }
  friend constexpr Set operator-(Set a, const Set& b) {
    for (std::size_t i = 0; i < a.w.size(); ++i) a.w[i] &= ~b.w[i];
    return a;
  }
  // The ranks in it, in order.
  template <class F>
  constexpr void each(F&& f) const {
    for (std::size_t i = 0; i < w.size(); ++i) {
      for (std::uint64_t rest = w[i]; rest; rest &= rest - 1) {
        f(static_cast<int>(i * 64) + std::countr_zero(rest));
      }
    }
  }
};

template <class T, int N>
struct Seq {
  std::array<T, static_cast<std::size_t>(N == 0 ? 1 : N)> items{};
  std::uint8_t n = 0;
  static_assert(N < 256);

  friend constexpr bool operator==(const Seq& a, const Seq& b) {
    if (a.n != b.n) return false;
    for (int i = 0; i < a.n; ++i) {
      if (!(a.items[static_cast<std::size_t>(i)] == b.items[static_cast<std::size_t>(i)]))
        return false;
    }
    return true;
  }
  constexpr int size() const { return n; }
  const T& at(long index, const char* where) const {
    if (index < 1 || index > n) undefined(where);
    return items[static_cast<std::size_t>(index - 1)];
  }
  bool holds(long index) const { return index >= 1 && index <= n; }
  T& item(long index) { return items[static_cast<std::size_t>(index - 1)]; }
  void push(const T& value) {
    if (n >= N) overflow("sequence", n + 1);
    items[n++] = value;
  }
  Seq append(const T& value) const {
    Seq out = *this;
    out.push(value);
    return out;
  }
  Seq slice(long from, long to, const char* where) const {
    Seq out;
    for (long i = from; i <= to; ++i) out.push(at(i, where));
    return out;
  }
  Seq tail(const char* where) const {
    if (n == 0) undefined(where);
    return slice(2, n, where);
  }
  Seq concat(const Seq& other) const {
    Seq out = *this;
    for (int i = 0; i < other.n; ++i) out.push(other.items[static_cast<std::size_t>(i)]);
    return out;
  }
};

// The domain D says how many keys there are (`n`), their type (`Key`), the rank of the key at a
// place and the place of a rank (-1: not in the domain).
template <class D, class T>
struct Fn {
  std::array<T, static_cast<std::size_t>(D::n == 0 ? 1 : D::n)> items{};
  friend constexpr bool operator==(const Fn&, const Fn&) = default;
  constexpr const T& operator[](int place) const { return items[static_cast<std::size_t>(place)]; }
  constexpr T& operator[](int place) { return items[static_cast<std::size_t>(place)]; }
};

template <class T>
concept Struct = requires { T::kVariants; };

// Calls f with each member of v that its variant has; the others are as if they were not there.
template <Struct T, class F>
[[gnu::always_inline]] inline void each_member(const T& v, F&& f) {
  if constexpr (T::kVariants == 1) {
    std::apply([&](auto... member) { (f(member), ...); }, T::all);
  } else {
    [&]<std::size_t... V>(std::index_sequence<V...>) {
      (
          [&] {
            if (v.tag() != static_cast<int>(V)) return;
            std::apply([&](auto... member) { (f(member), ...); }, std::get<V>(T::fields));
          }(),
          ...);
    }(std::make_index_sequence<T::kVariants>());
  }
}

// --- rank --------------------------------------------------------------------------------------

template <>
struct Rank<bool> {
  static constexpr int card = 2;
  static constexpr int find(bool v) { return v; }
  static constexpr int of(bool v) { return v; }
  static constexpr bool at(int r) { return r != 0; }
};
template <>
struct Rank<int> {
  static constexpr int card = TS_SET_HI - TS_SET_LO + 1;
  static constexpr int find(int v) { return v < TS_SET_LO || v > TS_SET_HI ? -1 : v - TS_SET_LO; }
  static int of(int v) {
    if (find(v) < 0) overflow("number in a set", v);
    return v - TS_SET_LO;
  }
  static constexpr int at(int r) { return r + TS_SET_LO; }
};
template <int N, int Id>
struct Rank<Atom<N, Id>> {
  static constexpr int card = N;
  static constexpr int find(Atom<N, Id> v) { return v.v; }
  static constexpr int of(Atom<N, Id> v) { return v.v; }
  static constexpr Atom<N, Id> at(int r) { return {static_cast<std::uint8_t>(r)}; }
};
template <class T, int N>
struct Rank<Set<T, N>> {
  static_assert(N <= 20, "sets of such sets are too many");
  static constexpr int card = 1 << N;
  static constexpr int find(const Set<T, N>& v) { return static_cast<int>(v.w[0]); }
  static constexpr int of(const Set<T, N>& v) { return static_cast<int>(v.w[0]); }
  static constexpr Set<T, N> at(int r) {
    Set<T, N> out;
    out.w[0] = static_cast<std::uint64_t>(r);
    return out;
  }
};
template <class T, int N>
struct Rank<Seq<T, N>> {
  static constexpr int power(int n) {
    int out = 1;
    for (int i = 0; i < n; ++i) out *= Rank<T>::card;
    return out;
  }
  static constexpr int before(int n) {
    int out = 0;
    for (int i = 0; i < n; ++i) out += power(i);
    return out;
  }
  static constexpr int card = before(N + 1);
  static int find(const Seq<T, N>& v) {
    int r = 0;
    for (int i = 0; i < v.n; ++i) {
      const int each = Rank<T>::find(v.items[static_cast<std::size_t>(i)]);
      if (each < 0) return -1;
      r = r * Rank<T>::card + each;
    }
    return before(v.n) + r;
  }
  static int of(const Seq<T, N>& v) {
    int r = 0;
    for (int i = 0; i < v.n; ++i)
      r = r * Rank<T>::card + Rank<T>::of(v.items[static_cast<std::size_t>(i)]);
    return before(v.n) + r;
  }
  static Seq<T, N> at(int r) {
    Seq<T, N> out;
    int n = 0;
    while (r >= before(n + 1)) ++n;
    r -= before(n);
    out.n = static_cast<std::uint8_t>(n);
    for (int i = n; i-- > 0; r /= Rank<T>::card)
      out.items[static_cast<std::size_t>(i)] = Rank<T>::at(r % Rank<T>::card);
    return out;
  }
};
template <class D, class T>
struct Rank<Fn<D, T>> {
  static constexpr int power() {
    int out = 1;
    for (int i = 0; i < D::n; ++i) out *= Rank<T>::card;
    return out;
  }
  static constexpr int card = power();
  static int find(const Fn<D, T>& v) {
    int r = 0;
    for (int i = 0; i < D::n; ++i) {
      const int each = Rank<T>::find(v[i]);
      if (each < 0) return -1;
      r = r * Rank<T>::card + each;
    }
    return r;
  }
  static int of(const Fn<D, T>& v) {
    int r = 0;
    for (int i = 0; i < D::n; ++i) r = r * Rank<T>::card + Rank<T>::of(v[i]);
    return r;
  }
  static Fn<D, T> at(int r) {
    Fn<D, T> out;
    for (int i = D::n; i-- > 0; r /= Rank<T>::card) out[i] = Rank<T>::at(r % Rank<T>::card);
    return out;
  }
};
// Tuples and records: by variant, then field by field in the order of their names.
template <Struct T>
struct Rank<T> {
  template <std::size_t V>
  static constexpr int variant_card() {
    return std::apply(
        [](auto... field) {
          return (1 * ... * Rank<std::remove_cvref_t<decltype(std::declval<T>().*field)>>::card);
        },
        std::get<V>(T::fields));
  }
  template <std::size_t... V>
  static constexpr int total(std::index_sequence<V...>) {
    return (0 + ... + variant_card<V>());
  }
  static constexpr int card = total(std::make_index_sequence<T::kVariants>());

  template <bool Strict, std::size_t V = 0>
  static int rank(const T& v) {
    if constexpr (V < T::kVariants) {
      if (v.tag() != static_cast<int>(V)) {
        const int rest = rank<Strict, V + 1>(v);
        return rest < 0 ? rest : variant_card<V>() + rest;
      }
      int r = 0;
      bool found = true;
      std::apply(
          [&](auto... field) {
            (
                [&] {
                  using R = Rank<std::remove_cvref_t<decltype(v.*field)>>;
                  const int each = Strict ? R::of(v.*field) : R::find(v.*field);
                  found = found && each >= 0;
                  r = r * R::card + each;
                }(),
                ...);
          },
          std::get<V>(T::fields));
      return found ? r : -1;
    }
    return -1;
  }
  static int find(const T& v) { return rank<false>(v); }
  static int of(const T& v) { return rank<true>(v); }

  template <std::size_t V = 0>
  static T unrank(int r) {
    if constexpr (V < T::kVariants) {
      if (r >= variant_card<V>()) return unrank<V + 1>(r - variant_card<V>());
      T out{};
      out.set_tag(static_cast<int>(V));
      int radix = variant_card<V>();
      std::apply(
          [&](auto... field) {
            (
                [&] {
                  using R = Rank<std::remove_cvref_t<decltype(out.*field)>>;
                  radix /= R::card;
                  out.*field = R::at(r / radix);
                  r %= radix;
                }(),
                ...);
          },
          std::get<V>(T::fields));
      return out;
    }
    return T{};
  }
  static const T& at(int r) {
    static const auto all = [] {
      std::array<T, static_cast<std::size_t>(card)> out;
      for (int i = 0; i < card; ++i) out[static_cast<std::size_t>(i)] = unrank(i);
      return out;
    }();
    return all[static_cast<std::size_t>(r)];
  }
};

// --- small operators ---------------------------------------------------------------------------

template <class D>
int place_of(int rank, const char* where) {
  const int place = rank < 0 ? -1 : D::place(rank);
  if (place < 0) undefined(where);
  return place;
}
// Numbers are those of 32 bits, as in the standard tools; what leaves them is no value.
template <class Operator>
int checked(Operator&& overflows, int a, int b, const char* where) {
  int out;
  if (overflows(a, b, &out)) undefined(where);
  return out;
}
inline int sum(int a, int b, const char* where) {
  return checked([](int x, int y, int* z) { return __builtin_add_overflow(x, y, z); }, a, b, where);
}
inline int difference(int a, int b, const char* where) {
  return checked([](int x, int y, int* z) { return __builtin_sub_overflow(x, y, z); }, a, b, where);
}
inline int product(int a, int b, const char* where) {
  return checked([](int x, int y, int* z) { return __builtin_mul_overflow(x, y, z); }, a, b, where);
}
inline int power(int a, int b, const char* where) {
  if (b < 0 || (a == 0 && b == 0)) undefined(where);
  if (a == 0 || a == 1) return a;
  if (a == -1) return b % 2 ? -1 : 1;
  int out = 1;
  while (b-- > 0) out = product(out, a, where);
  return out;
}
inline int floor_div(int a, int b, const char* where) {
  if (b == 0 || (b == -1 && a < -INT_MAX)) undefined(where);
  const int q = a / b;
  return q - (a % b != 0 && (a < 0) != (b < 0));
}
inline int floor_mod(int a, int b, const char* where) {
  if (b <= 0) undefined(where);
  return a % b < 0 ? a % b + b : a % b;
}

// Where a member stands among a struct's `all`.
template <class T, class Member>
constexpr std::size_t place(Member member) {
  std::size_t at = 0, found = 0;
  std::apply(
      [&](auto... field) {
        (
            [&] {
              if constexpr (std::is_same_v<decltype(field), Member>) {
                if (field == member) found = at;
              }
              ++at;
            }(),
            ...);
      },
      T::all);
  return found;
}

// --- a value that is computed when it is first asked for ---------------------------------------

template <class F>
class Lazy {
 public:
  explicit Lazy(F f) : f_(f) {}
  const auto& operator()() const {
    if (!value_) value_ = f_();
    return *value_;
  }

 private:
  F f_;
  mutable std::optional<std::invoke_result_t<F>> value_;
};

}  // namespace tokenspeed::checker
