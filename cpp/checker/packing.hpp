// States as bits: every value has a fixed width, so that a state is a few words and equal states
// are equal words. Rule: what does not fit raises Overflow; nothing is cut off.
#pragma once

#include "values.hpp"

namespace tokenspeed::checker {

template <std::size_t Words>
struct Packed {
  std::array<Word, Words == 0 ? 1 : Words> w{};
  friend constexpr auto operator<=>(const Packed&, const Packed&) = default;
};

template <class T>
struct Pack {  // numbers and names: one field
  static constexpr int bits = bits_for(static_cast<std::uint64_t>(Rank<T>::card));
  static std::uint64_t of(const T& v) { return static_cast<std::uint64_t>(Rank<T>::of(v)); }
  static T from(std::uint64_t x) { return Rank<T>::at(static_cast<int>(x)); }
};
template <>
struct Pack<int> {
  static constexpr int bits = bits_for(static_cast<std::uint64_t>(TS_INT_HI - TS_INT_LO) + 1);
  static std::uint64_t of(int v) {
    if (v < TS_INT_LO || v > TS_INT_HI) overflow("number", v);
    return static_cast<std::uint64_t>(v - TS_INT_LO);
  }
  static int from(std::uint64_t x) { return static_cast<int>(x) + TS_INT_LO; }
};

template <class T>
constexpr int width();
template <class T>
struct Width {
  static constexpr int value = Pack<T>::bits;
};
template <class T, int N>
struct Width<Set<T, N>> {
  static constexpr int value = N;
};
template <class T, int N>
struct Width<Seq<T, N>> {
  static constexpr int value = bits_for(N + 1) + N * width<T>();
};
template <class D, class T>
struct Width<Fn<D, T>> {
  static constexpr int value = D::n * width<T>();
};
template <Struct T>
struct Width<T> {
  static constexpr int sum() {
    return std::apply(
        [](auto... field) {
          return (0 + ... + width<std::remove_cvref_t<decltype(std::declval<T>().*field)>>());
        },
        T::all);
  }
  static constexpr int value = bits_for(T::kVariants) + sum();
};
template <class T>
constexpr int width() {
  return Width<T>::value;
}

// Calls `field(value, bits, offset)` for the pieces of a value; offsets are compile-time constants
// in effect, since every loop has a constant bound.
struct Writer {
  std::uint64_t* w;
  int at = 0;
  [[gnu::always_inline]] void put(std::uint64_t x, int n) {
    if (n == 0) return;
    const int shift = at & 63;
    w[at >> 6] |= x << shift;
    if (shift + n > 64) w[(at >> 6) + 1] |= x >> (64 - shift);
    at += n;
  }
};
struct Reader {
  const std::uint64_t* w;
  int at = 0;
  [[gnu::always_inline]] std::uint64_t get(int n) {
    if (n == 0) return 0;
    const int shift = at & 63;
    std::uint64_t x = w[at >> 6] >> shift;
    if (shift + n > 64) x |= w[(at >> 6) + 1] << (64 - shift);
    at += n;
    return n == 64 ? x : x & ((std::uint64_t{1} << n) - 1);
  }
};

template <class T>
[[gnu::always_inline]] inline void pack(Writer& out, const T& v) {
  out.put(Pack<T>::of(v), Pack<T>::bits);
}
template <class T>
[[gnu::always_inline]] inline void unpack(Reader& in, T& v) {
  v = Pack<T>::from(in.get(Pack<T>::bits));
}
template <class T, int N>
[[gnu::always_inline]] inline void pack(Writer& out, const Set<T, N>& v) {
  for (int i = 0; i < Set<T, N>::kWords; ++i) {
    out.put(v.w[static_cast<std::size_t>(i)], N - 64 * i < 64 ? N - 64 * i : 64);
  }
}
template <class T, int N>
[[gnu::always_inline]] inline void unpack(Reader& in, Set<T, N>& v) {
  for (int i = 0; i < Set<T, N>::kWords; ++i) {
    v.w[static_cast<std::size_t>(i)] = in.get(N - 64 * i < 64 ? N - 64 * i : 64);
  }
}
template <class T, int N>
void pack(Writer& out, const Seq<T, N>& v);
template <class T, int N>
void unpack(Reader& in, Seq<T, N>& v);
template <class D, class T>
[[gnu::always_inline]] inline void pack(Writer& out, const Fn<D, T>& v);
template <class D, class T>
[[gnu::always_inline]] inline void unpack(Reader& in, Fn<D, T>& v);
template <Struct T>
[[gnu::always_inline]] inline void pack(Writer& out, const T& v);
template <Struct T>
[[gnu::always_inline]] inline void unpack(Reader& in, T& v);

template <class T, int N>
inline void pack(Writer& out, const Seq<T, N>& v) {
  out.put(v.n, bits_for(N + 1));
  const int end = out.at + N * width<T>();
  for (int i = 0; i < v.n; ++i) pack(out, v.items[static_cast<std::size_t>(i)]);
  out.at = end;
}
template <class T, int N>
inline void unpack(Reader& in, Seq<T, N>& v) {
  v.n = static_cast<std::uint8_t>(in.get(bits_for(N + 1)));
  const int end = in.at + N * width<T>();
  for (int i = 0; i < v.n; ++i) unpack(in, v.items[static_cast<std::size_t>(i)]);
  in.at = end;
}
template <class D, class T>
[[gnu::always_inline]] inline void pack(Writer& out, const Fn<D, T>& v) {
  for (int i = 0; i < D::n; ++i) pack(out, v[i]);
}
template <class D, class T>
[[gnu::always_inline]] inline void unpack(Reader& in, Fn<D, T>& v) {
  for (int i = 0; i < D::n; ++i) unpack(in, v[i]);
}
template <Struct T>
[[gnu::always_inline]] inline void pack(Writer& out, const T& v) {
  out.put(static_cast<std::uint64_t>(v.tag()), bits_for(T::kVariants));
  std::apply([&](auto... field) { (pack(out, v.*field), ...); }, T::all);
}
template <Struct T>
[[gnu::always_inline]] inline void unpack(Reader& in, T& v) {
  v.set_tag(static_cast<int>(in.get(bits_for(T::kVariants))));
  std::apply([&](auto... field) { (unpack(in, v.*field), ...); }, T::all);
}

}  // namespace tokenspeed::checker
