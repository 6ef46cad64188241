// The actions of specs/Draft.tla: a row that computes guesses behind a request's last token, pages
// for it alone, and what becomes of both when it is known how many of the guesses are right.
#include <algorithm>

#include "control.hpp"

namespace tokenspeed {

using lifecycle::Action;

// All tokens known, and none under way.
bool Control::may_guess(RequestIndex index) const noexcept {
  const Record& record = records_[index];
  return record.state == State::Decoding && record.pins == 0 && wanted(index) > 0;
}

// The token after the last draft is sampled too, and is the last of all at most.
std::int32_t Control::guesses(RequestIndex index) const noexcept {
  const Record& record = records_[index];
  const std::int32_t most = std::min(config_.chunk, record.length_max - record.known());
  return std::min(config_.drafts_max, most - 1);
}

std::int32_t Control::propose(RequestIndex index, std::span<const Token> draft) {
  Record& record = records_[index];
  if (record.state != State::Decoding || record.guessing) return 0;
  const auto most = static_cast<std::size_t>(config_.drafts_max);
  draft = draft.first(std::min(draft.size(), most));
  record.draft.assign(draft.begin(), draft.end());
  record.offered = !draft.empty();
  return static_cast<std::int32_t>(draft.size());
}

std::int32_t Control::guess(RequestIndex index) {
  Record& record = records_[index];
  if (record.state != State::Decoding || record.guessing) return 0;
  if (!record.ngrams) record.ngrams = std::make_unique<Ngrams>();
  record.ngrams->extend(record.tokens);
  record.draft.clear();
  record.ngrams->guess(record.tokens, static_cast<std::size_t>(config_.drafts_max), record.draft);
  record.offered = !record.draft.empty();
  return static_cast<std::int32_t>(record.draft.size());
}

bool Control::reserve(RequestIndex index, PageId id) {
  if (!may_guess(index) || !NoneLacks()) return false;
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Acquire, S)) {
      Record& record = records_[index];
      if (record.holds - record.planned >= 1 + guesses(index)) return false;
      auto page = pool_.take(id);
      if (!page) return false;
      handle<S>(index).pages().append(std::move(*page));
      count_pages(record, record.pages + 1);
      if (recording_) trace_.push_back({"Reserve", record.number, id, -1, {}});
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

bool Control::speculate(RequestIndex index, std::int32_t drafts) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Schedule, S)) {
      Record& record = records_[index];
      const std::int32_t room = record.holds - record.planned;
      const auto proposed = static_cast<std::int32_t>(record.offered ? record.draft.size() : 0);
      if (!may_guess(index)) return false;
      if (drafts < 1 || drafts > std::min({guesses(index), room - 1, proposed})) return false;
      auto verdict = lifecycle::permit_Schedule(*this, handle<S>(index));
      if (!verdict) return false;
      handle<S>(index) =
          lifecycle::Schedule(*this, std::move(handle<S>(index)), std::move(verdict).take());
      note(-1, drafts);
      if (recording_) trace_.back().action = "Speculate";
      plan_.push_back({index, record.planned, 1 + drafts, true, drafts});
      plan_drafts_ += static_cast<std::size_t>(drafts);
      record.planned += 1 + drafts;
      record.in_plan = record.guessing = true;
      ++record.pins;
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

// The last page, if neither a row under way nor the next one writes it: so it is the request's own.
bool Control::trim(RequestIndex index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Acquire, S)) {
      Record& record = records_[index];
      const bool wants = Wants({index, record.incarnation});
      const std::int32_t needed = wants ? std::min(wanted(index), config_.chunk) : 0;
      const std::int32_t left = (record.pages - 1) / groups() * config_.page_size - record.planned;
      if (record.pages == 0 || left < needed) return false;
      auto last = handle<S>(index).pages().pop();
      pool_.give_back(std::get<ExclusivePage>(std::move(last)));
      count_pages(record, record.pages - 1);
      if (recording_) trace_.push_back({"Trim", record.number, -1, -1, {}});
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

const char* Control::wrong_run(const Row& row, std::span<const Token> run) const noexcept {
  const Record& record = records_[row.index];
  const bool live = record.state == State::Prefilling || record.state == State::Decoding;
  if (!live || !row.samples) return nullptr;  // it is dropped
  if (run.size() == 1) return run[0] < 0 ? "was sampled and has no token" : nullptr;
  const auto end = std::ranges::find_if(run, [](Token token) { return token < 0; });
  if (end == run.begin()) return "was sampled and has no token";
  if (std::ranges::any_of(end, run.end(), [](Token token) { return token != -1; })) {
    return "goes on after its end";
  }
  const bool right = std::equal(run.begin(), end - 1, record.draft.begin());
  return right ? nullptr : "has a token behind a draft that is another one";
}

bool Control::wrong_runs(const Ticket& ticket, std::span<const Token> token_ids) const noexcept {
  for (const Row& row : ticket.rows) {
    const auto run = token_ids.first(static_cast<std::size_t>(row.drafts) + 1);
    if (row.drafts > 0 && wrong_run(row, run)) return true;
    token_ids = token_ids.subspan(run.size());
  }
  return false;
}

// The tokens of a run, how many they are. The last is the one that the step completes with.
std::int32_t Control::accept(Record& record, std::span<const Token> run) {
  std::size_t taken = 0;
  do {
    if (recording_ && taken > 0) trace_.push_back({"Accept", record.number, -1, record.last, {}});
    record.tokens.push_back(run[taken]);
    record.last = run[taken++];
  } while (taken < run.size() && run[taken] >= 0);
  record.offered = false;  // without a look at the draft: it lies far from here
  return static_cast<std::int32_t>(taken);
}

// What is right stays where it is; the rest is computed again, in place.
void Control::roll_back(const Row& row, std::int32_t accepted) noexcept {
  Record& record = records_[row.index];
  record.planned = record.done = row.from + std::max(accepted, 1);
  record.guessing = false;
}

}  // namespace tokenspeed
