// When requests are planned with drafts. Rule: last, with tokens and pages that nobody else wants
// in this step: drafts keep nobody out, and preempt nobody.
#include <algorithm>

#include "scheduler.hpp"

namespace tokenspeed {

std::int32_t Scheduler::propose(std::int64_t number, std::span<const Token> draft) {
  const auto index = control_.find(number);
  return index ? control_.propose(*index, draft) : 0;
}

std::int64_t Scheduler::guess(std::span<const std::int64_t> numbers) {
  std::int64_t drafts = 0;
  for (const std::int64_t number : numbers) {
    if (const auto index = control_.find(number)) drafts += control_.guess(*index);
  }
  return drafts;
}

// Drafts that a request could have in the plan being made.
std::int32_t Scheduler::draftable(RequestIndex index) const noexcept {
  const Record& record = control_.record(index);
  if (!record.offered || record.pins > 0) return 0;
  return std::min(static_cast<std::int32_t>(record.draft.size()), control_.guesses(index));
}

// One with drafts takes the page that it needs without them now, and its row when all others have
// theirs. While its last row is in flight it waits: the drafts would come too late behind another.
void Scheduler::decode(RequestIndex index, Plan& plan) {
  const Record& record = control_.record(index);
  if (!record.offered) {
    schedule(index, 1, plan);
  } else if (record.pins == 0) {
    acquire(index, 1, plan);
    guessing_.push_back(index);
  }
}

void Scheduler::guess_all(Plan& plan) {
  for (const RequestIndex index : guessing_) {
    const Record& record = control_.record(index);
    if (record.state != lifecycle::State::Decoding || record.in_plan) continue;  // preempted since
    const std::int32_t drafts = guess(index, std::min(draftable(index), drafts_left_), plan);
    drafts_left_ -= drafts;
    if (drafts == 0) schedule(index, 1, plan);
  }
  guessing_.clear();
}

// As many drafts as there are pages for; how many that is.
std::int32_t Scheduler::guess(RequestIndex index, std::int32_t drafts, Plan& plan) {
  if (drafts < 1) return 0;
  const Record& record = control_.record(index);
  const auto room = [&] { return record.holds - record.planned; };
  while (room() < 1 + drafts && page_for_drafts()) {
    if (!control_.reserve(index, *control_.pool().next())) break;
  }
  const std::int32_t count = std::min(drafts, room() - 1);
  if (!control_.speculate(index, count)) return 0;
  write_row(plan);
  work_.add(1, control_.planned().back().from);
  work_.prefill_tokens += count;
  return count;
}

// Is there a page that is promised to nobody, and that nobody who waits could use?
bool Scheduler::page_for_drafts() {
  if (!control_.queue().empty() && control_.SlotFree()) return false;
  if (!control_.NoneLacks() || spare_pages() < 1) return false;
  return control_.pool().free() > 0 || evict_one();
}

// Of a row with drafts that has completed: pages that it took for those that were wrong go back.
void Scheduler::settle(const Outcome& outcome) {
  while (control_.trim(outcome.index)) {
  }
  if (outcome.accepted == 0) return;
  counts_.drafts += outcome.drafts;
  counts_.drafts_accepted += outcome.accepted - 1;
}

}  // namespace tokenspeed
