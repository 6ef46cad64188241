// States and keys of a size that is known when the program runs, and the table of those reached.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "model.hpp"

namespace tokenspeed::checker {

using Index = std::uint32_t;
inline constexpr Index kNone = 0xffffffffu;

constexpr Word mix(Word x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ull;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}
constexpr Word join(Word a, Word b) {
  return mix(a * 0x9e3779b97f4a7c15ull + b + 0x7f4a7c15ull);
}

// One state, with a place of its own.
class Held {
 public:
  explicit Held(const AnyModel& model) : bytes_(model.facts.state_bytes) {}

  operator StatePtr() const { return bytes_.data(); }
  void* data() { return bytes_.data(); }
  Held& operator=(StatePtr state) {
    std::memcpy(bytes_.data(), state, bytes_.size());
    return *this;
  }

 private:
  std::vector<std::byte> bytes_;
};

// A row of states.
class States {
 public:
  explicit States(const AnyModel& model) : each_(model.facts.state_bytes) {}

  std::size_t size() const { return bytes_.size() / each_; }
  bool empty() const { return bytes_.empty(); }
  StatePtr operator[](std::size_t at) const { return bytes_.data() + at * each_; }
  void clear() { bytes_.clear(); }
  void push(StatePtr state) {
    const auto* from = static_cast<const std::byte*>(state);
    bytes_.insert(bytes_.end(), from, from + each_);
  }

 private:
  std::size_t each_;
  std::vector<std::byte> bytes_;
};

// Every state that was reached, by number, and how.
class Store {
 public:
  explicit Store(const AnyModel& model) : words_(model.facts.words) {
    slots_.assign(1 << 12, kEmpty);
  }

  std::size_t words() const { return words_; }
  std::size_t size() const { return parents_.size(); }
  const Word* operator[](Index at) const { return keys_.data() + at * words_; }
  Index parent(Index at) const { return parents_[at]; }
  std::size_t bytes() const {
    return keys_.capacity() * sizeof(Word) + parents_.capacity() * 4 + slots_.capacity() * 8;
  }
  // What the next doubling would need.
  std::size_t bytes_next() const { return 2 * keys_.size() * sizeof(Word) + slots_.size() * 16; }

  std::uint64_t hash(const Word* key) const {
    std::uint64_t h = 0x243f6a8885a308d3ull;
    for (std::size_t i = 0; i < words_; ++i) h = join(h, key[i]);
    return h;
  }
  void prefetch(std::uint64_t hash) const {
    __builtin_prefetch(&slots_[hash & (slots_.size() - 1)]);
  }
  Index find(const Word* key, std::uint64_t hash) const {
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t at = hash & mask;; at = (at + 1) & mask) {
      const std::uint64_t slot = slots_[at];
      if (slot == kEmpty) return kNone;
      if (static_cast<Index>(slot >> 32) == static_cast<Index>(hash >> 32) &&
          std::equal(key, key + words_, (*this)[static_cast<Index>(slot)])) {
        return static_cast<Index>(slot);
      }
    }
  }
  Index find(const Word* key) const { return find(key, hash(key)); }

  // The key must not be there yet.
  void enter(const Word* key, std::uint64_t hash, Index parent) {
    if (2 * (size() + 1) > slots_.size()) grow();
    place(hash, static_cast<Index>(size()));
    keys_.insert(keys_.end(), key, key + words_);
    parents_.push_back(parent);
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};

  void place(std::uint64_t hash, Index index) {
    const std::size_t mask = slots_.size() - 1;
    std::size_t at = hash & mask;
    while (slots_[at] != kEmpty) at = (at + 1) & mask;
    slots_[at] = (hash >> 32 << 32) | index;
  }
  void grow() {
    std::vector<std::uint64_t>(slots_.size() * 2, kEmpty).swap(slots_);
    for (Index i = 0; i < size(); ++i) place(hash((*this)[i]), i);
  }

  std::size_t words_;
  std::vector<Word> keys_;
  std::vector<Index> parents_;
  std::vector<std::uint64_t> slots_;
};

}  // namespace tokenspeed::checker
