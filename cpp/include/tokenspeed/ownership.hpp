// What a request holds, and the permission to move it: the few types that the generated lifecycle
// is made of. Rule: everything here is move-only and costs nothing where nothing is held.
#pragma once

#include <cassert>
#include <cstdint>
#include <string_view>
#include <utility>

namespace tokenspeed {

// A request's place in its store, and which life of that place it is: an event that carries an
// older incarnation means somebody who is gone.
struct RequestId {
  std::uint32_t index = 0;
  std::uint32_t incarnation = 0;
  friend constexpr bool operator==(RequestId, RequestId) = default;
};

namespace lifecycle {

// The right to be a request in some state. Exactly one exists for each live request; a moved-from
// one is empty, and an action on it is caught in checked builds (C++ has no linear types).
class OwnedId {
 public:
  constexpr OwnedId() noexcept = default;
  constexpr explicit OwnedId(RequestId id) noexcept : id_(id), held_(true) {}
  constexpr OwnedId(OwnedId&& other) noexcept
      : id_(other.id_), held_(std::exchange(other.held_, false)) {}
  constexpr OwnedId& operator=(OwnedId&& other) noexcept {
    assert(!held_ && "a live request was overwritten");
    id_ = other.id_;
    held_ = std::exchange(other.held_, false);
    return *this;
  }
  OwnedId(const OwnedId&) = delete;
  OwnedId& operator=(const OwnedId&) = delete;
  ~OwnedId() = default;

  constexpr RequestId get() const noexcept {
    assert(held_ && "this request has moved on");
    return id_;
  }
  constexpr bool held() const noexcept { return held_; }

 private:
  RequestId id_{};
  bool held_ = false;
};

// A resource of type T where `owned`, nothing otherwise.
template <bool owned, class T>
struct Held {
  T value;
};
template <class T>
struct Held<false, T> {};

struct Moves;  // the generated actions; they alone make requests and use permits up

// The answer "yes" of an action's guards, for one request; the action consumes it.
template <auto action>
class [[nodiscard]] Permit {
 public:
  Permit(Permit&& other) noexcept : id_(other.id_) {}
  Permit& operator=(Permit&&) = delete;
  Permit(const Permit&) = delete;
  Permit& operator=(const Permit&) = delete;
  ~Permit() = default;

 private:
  friend struct Moves;
  explicit Permit(RequestId id) noexcept : id_(id) {}
  RequestId id_;
};

// Either a Permit, or the name of the first guard that said no.
template <auto action>
class [[nodiscard]] Verdict {
 public:
  explicit operator bool() const noexcept { return refused_.empty(); }
  std::string_view refused() const noexcept { return refused_; }
  Permit<action> take() && noexcept {
    assert(refused_.empty() && "refused, yet used");
    return std::move(permit_);
  }

 private:
  friend struct Moves;
  Verdict(Permit<action>&& permit, std::string_view refused) noexcept
      : permit_(std::move(permit)), refused_(refused) {}
  Permit<action> permit_;
  std::string_view refused_;
};

}  // namespace lifecycle
}  // namespace tokenspeed
