#include "retention.hpp"

#include <algorithm>
#include <utility>

namespace tokenspeed {

Retention::Retention(PageId pages, PageId kept_max) : kept_max_(kept_max) {
  const auto tails = static_cast<std::size_t>(pages) + 1;  // a page each, and an open one
  tails_.reserve(tails);
  spare_.reserve(tails);
  for (auto& shelf : shelves_) shelf.reserve(tails);
  lapsing_.reserve(tails);
}

void Retention::advance(Microseconds now) {
  constexpr Microseconds kEnd = Microseconds{1} << 62;  // later times cannot be added to
  now = std::min(now, kEnd);
  if (now <= now_) return;
  now_ = now;
  next_ = -1;
  while (!lapsing_.empty()) {
    const TailId id = lapsing_.front();
    if (static_cast<Microseconds>(at(id).order) > now) return;
    classify(id, at(id).lapsed, ++placings_);
  }
}

// --- pages of a tail ---------------------------------------------------------------------------

TailId Retention::open(std::uint64_t session, bool revisits) {
  if (spare_.empty()) {
    spare_.push_back(static_cast<TailId>(tails_.size()));
    tails_.emplace_back();
  }
  const TailId id = spare_.back();
  spare_.pop_back();
  Tail& tail = at(id);
  tail = Tail{};
  tail.session = session;
  tail.revisits = revisits;
  tail.born = ++births_;
  return id;
}

void Retention::grow(TailId id, NodeId node) noexcept {
  Tail& tail = at(id);
  if (tail.pages++ == 0) tail.end = node;
}

NodeId Retention::close(TailId id) noexcept {
  const NodeId end = at(id).end;
  if (end < 0) retire(id);
  return end;
}

bool Retention::touch(TailId id, std::uint64_t session) {
  Tail& tail = at(id);
  if (std::exchange(tail.counted, false)) model_.returned(tail.as, now_ - tail.since);
  if (session == 0 || tail.session != session) return false;
  return tail.revisits || tail.as == kind::kLeft || tail.as == kind::kRevisited;
}

void Retention::shrink(TailId id) {
  lose_page(at(id));
  if (at(id).pages > 0) return;
  must_stay(id);
  retire(id);
}

void Retention::cut(TailId id, NodeId above) {
  Tail& tail = at(id);
  lose_page(tail);
  tail.end = above;
  if (above >= 0) return;
  if (tail.counted) model_.lost(tail.as, now_ - tail.since);
  must_stay(id);
  retire(id);
}

void Retention::lose_page(Tail& tail) noexcept {
  --tail.pages;
  if (tail.as == kind::kKept) --kept_;
}

void Retention::retire(TailId id) noexcept {
  if (at(id).lapse_place >= 0) lapsing_.erase(tails_, id);
  at(id).born = 0;
  spare_.push_back(id);
}

void Retention::may_go(TailId id) {
  if (at(id).shelf_place >= 0) return;
  next_ = -1;
  shelves_[at(id).as].push(tails_, id);
}

void Retention::must_stay(TailId id) {
  if (at(id).shelf_place < 0) return;
  next_ = -1;
  shelves_[at(id).as].erase(tails_, id);
}

// --- what a tail is ----------------------------------------------------------------------------

void Retention::place(TailId id, Kind as, Microseconds keep_until) {
  Tail& tail = at(id);
  tail.since = now_;
  tail.counted = as < kind::kTurn;
  if (tail.counted) model_.left(as);
  const bool keep = keep_until > now_ && tail.pages <= kept_max_ - kept_;
  if (!keep) return classify(id, as, ++placings_);
  tail.lapsed = as;
  classify(id, kind::kKept, static_cast<std::uint64_t>(keep_until));
}

// Moves it between shelves, if it lies on one at all.
void Retention::classify(TailId id, Kind as, std::uint64_t order) {
  Tail& tail = at(id);
  const bool on_shelf = tail.shelf_place >= 0;
  if (on_shelf) must_stay(id);
  if (tail.as == kind::kKept) {
    kept_ -= tail.pages;
    lapsing_.erase(tails_, id);
  }
  tail.as = as;
  tail.order = order;
  if (as == kind::kKept) {
    kept_ += tail.pages;
    lapsing_.push(tails_, id);
  }
  if (on_shelf) may_go(id);
}

NodeId Retention::victim() const noexcept {
  if (next_ < 0) next_ = choose();
  return next_ < 0 ? -1 : at(next_).end;
}

TailId Retention::choose() const noexcept {
  const auto first = [this](Kind as) { return shelves_[as].empty() ? -1 : shelves_[as].front(); };
  if (const TailId forgotten = first(kind::kForgotten); forgotten >= 0) return forgotten;
  TailId lowest = -1;
  double density = 0;
  for (Kind as = 0; as < kind::kLearned; ++as) {
    const TailId id = first(as);
    if (id < 0) continue;
    const double found = model_.density(as, now_ - at(id).since);
    if (lowest >= 0 && found >= density) continue;
    lowest = id;
    density = found;
  }
  if (lowest >= 0) return lowest;
  const TailId awaited = first(kind::kAwaited);
  return awaited >= 0 ? awaited : first(kind::kKept);
}

bool Retention::right(PageId pages) const noexcept {
  PageId all = 0;
  PageId kept = 0;
  for (const Tail& tail : tails_) {
    if (tail.born == 0) continue;
    all += tail.pages;
    kept += tail.as == kind::kKept ? tail.pages : 0;
    if (tail.as == kind::kKept && static_cast<Microseconds>(tail.order) <= now_) return false;
  }
  return all == pages && kept == kept_ && kept_ <= kept_max_;
}

// --- the heap ----------------------------------------------------------------------------------

template <std::int32_t Retention::Tail::* Place>
void Retention::Heap<Place>::put(std::vector<Tail>& tails, std::size_t place, TailId id) noexcept {
  ids_[place] = id;
  tails[static_cast<std::size_t>(id)].*Place = static_cast<std::int32_t>(place);
}

// Moves what stands at a place up or down to where it belongs.
template <std::int32_t Retention::Tail::* Place>
void Retention::Heap<Place>::sift(std::vector<Tail>& tails, std::size_t place) noexcept {
  const auto before = [&](TailId a, TailId b) {
    const std::uint64_t order_a = tails[static_cast<std::size_t>(a)].order;
    const std::uint64_t order_b = tails[static_cast<std::size_t>(b)].order;
    return order_a != order_b ? order_a < order_b : a < b;
  };
  const TailId id = ids_[place];
  for (; place > 0 && before(id, ids_[(place - 1) / 2]); place = (place - 1) / 2) {
    put(tails, place, ids_[(place - 1) / 2]);
  }
  for (std::size_t child = 2 * place + 1; child < ids_.size(); child = 2 * place + 1) {
    if (child + 1 < ids_.size() && before(ids_[child + 1], ids_[child])) ++child;
    if (!before(ids_[child], id)) break;
    put(tails, place, ids_[child]);
    place = child;
  }
  put(tails, place, id);
}

template <std::int32_t Retention::Tail::* Place>
void Retention::Heap<Place>::push(std::vector<Tail>& tails, TailId id) {
  ids_.push_back(id);
  sift(tails, ids_.size() - 1);
}

template <std::int32_t Retention::Tail::* Place>
void Retention::Heap<Place>::erase(std::vector<Tail>& tails, TailId id) noexcept {
  const auto place =
      static_cast<std::size_t>(std::exchange(tails[static_cast<std::size_t>(id)].*Place, -1));
  const TailId last = ids_.back();
  ids_.pop_back();
  if (last == id) return;
  put(tails, place, last);
  sift(tails, place);
}

}  // namespace tokenspeed
