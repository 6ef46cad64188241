// What the generated lifecycle asks of the control plane before a move, and is told of after it:
// guards that look beyond one request, the counts that answer them at once, and the trace.
#include <algorithm>

#include "control.hpp"

namespace tokenspeed {

using lifecycle::Action;

std::int32_t Control::wanted(RequestIndex index) const noexcept {
  const Record& record = records_[index];
  const std::int32_t known = record.known() - record.planned;
  if (known > 0) return known;
  // The one that a step in flight will have sampled; the last one of all is not fed back. Where
  // that one comes is unknown as long as drafts before it are not judged.
  const bool in_flight = record.pins > (record.in_plan ? 1 : 0) && !record.guessing;
  return in_flight && record.planned < record.length_max - 1 ? 1 : 0;
}

bool Control::Starved() const noexcept {
  return lacking_ > 0 && pool_.free() == 0 && host_.loading() == 0;  // what is loaded will be free
}

bool Control::NoneLacks() const noexcept {
  return lacking_ == 0;
}

bool Control::NoneEvictable() const noexcept {
  return index_.none_evictable();
}

bool Control::SlotFree() const noexcept {
  return !free_slots_.empty();
}

bool Control::FirstQueued(RequestId id) const noexcept {
  return !queued_.empty() && queued_.begin()->second == id.index;
}

bool Control::Wants(RequestId id) const noexcept {
  const Record& record = records_[id.index];
  const bool live = record.state == State::Prefilling || record.state == State::Decoding;
  return live && !record.in_plan && wanted(id.index) > 0;
}

bool Control::Lacks(RequestId id) const noexcept {
  const Record& record = records_[id.index];
  return Wants(id) && record.holds - record.planned < std::min(wanted(id.index), config_.chunk);
}

bool Control::Fits(RequestId id) const noexcept {
  // The last token is never fed back, so it needs no KV.
  return pages_needed(records_[id.index].length_max - 1) <= config_.pages;
}

bool Control::LastRunning(RequestId id) const noexcept {
  return !running_.empty() && running_.back() == id.index;
}

bool Control::Alone(RequestId id) const noexcept {
  return running_.size() == 1 && running_.front() == id.index;
}

bool Control::Pinned(RequestId id) const noexcept {
  return records_[id.index].pins > 0;
}

std::int32_t Control::owed(const Record& record) const noexcept {
  const bool live = record.state == State::Prefilling || record.state == State::Decoding;
  if (!live || record.known() <= std::max(record.planned, record.holds)) return 0;
  const std::int32_t whole =
      std::max(0, pages_for(record.known(), config_.page_size) * groups() - record.pages);
  if (!slides_) return whole;
  const std::int32_t held = record.pages - record.slid;
  return std::clamp(pages_at_once(record.known()) - held, 0, whole);
}

// After whatever a request's lacking, or what it is promised, depends on has changed.
void Control::recount(RequestIndex index) noexcept {
  Record& record = records_[index];
  const bool lacks = Lacks({index, record.incarnation});
  lacking_ += static_cast<std::int32_t>(lacks) - static_cast<std::int32_t>(record.lacks);
  record.lacks = lacks;
  const std::int32_t promised = owed(record);
  promised_ += promised - record.promised;
  record.promised = promised;
}

void Control::moved(Action action, RequestId id, State from, State to) noexcept {
  Record& record = records_[id.index];
  record.state = to;
  const auto row = static_cast<std::size_t>(action) * kStates + static_cast<std::size_t>(from);
  ++transitions_[row * kStates + static_cast<std::size_t>(to)];
  if (!recording_) return;
  events_.push_back({action, record.number, id.incarnation, from, to});
  trace_.push_back({name(action), record.number, -1, -1, name(to)});
}

// What the move just made was about.
void Control::note(PageId page, std::int64_t value) noexcept {
  if (!recording_) return;
  trace_.back().page = page;
  trace_.back().value = value;
}

// A step of no single request.
void Control::trace(std::string_view action, PageId page, std::int64_t value, std::string_view to) {
  if (recording_) trace_.push_back({action, -1, page, value, to});
}

}  // namespace tokenspeed
