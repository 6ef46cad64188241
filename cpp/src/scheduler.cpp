#include "scheduler.hpp"

#include <algorithm>
#include <limits>

namespace tokenspeed {

using lifecycle::Action;

namespace {

constexpr std::int32_t pages_for(std::int32_t tokens, std::int32_t page_size) noexcept {
  return (tokens + page_size - 1) / page_size;
}

}  // namespace

// --- configuration, tear-down
// -----------------------------------------------------------------------

std::string Scheduler::invalid(const SchedulerConfig& config) {
  const auto below = [](const char* field, std::int32_t value, std::int32_t least) {
    return std::string(field) + ": got " + std::to_string(value) + "; expected at least " +
           std::to_string(least);
  };
  if (config.page_size < 1) return below("page_size", config.page_size, 1);
  if (config.pages < 1) return below("pages", config.pages, 1);
  if (config.slots < 1) return below("slots", config.slots, 1);
  if (config.waiting_max < 1) return below("waiting_max", config.waiting_max, 1);
  if (config.step_tokens < config.slots) {
    return below("step_tokens", config.step_tokens, config.slots);
  }
  if (config.context_max < 2) return below("context_max", config.context_max, 2);
  if (config.overlap < 0) return below("overlap", config.overlap, 0);
  return {};
}

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(config), pool_(config.pages), index_(config.page_size) {
  for (std::int32_t slot = config.slots; slot-- > 0;) free_slots_.push_back(slot);
}

Scheduler::~Scheduler() {
  const auto abandon = [this]<class R>(std::vector<R>& requests) {
    for (R& request : requests) {
      if constexpr (lifecycle::owns_pages(R::kState)) empty(request.pages());
      request.abandon();
    }
  };
  std::apply([&](auto&... shelf) { (abandon(shelf.requests), ...); }, shelves_);
}

// The last page first, so that the index can let leaves go.
void Scheduler::empty(PageTable& pages) {
  while (!pages.empty()) {
    auto entry = pages.pop();
    if (auto* own = std::get_if<ExclusivePage>(&entry)) pool_.give_back(std::move(*own));
    if (auto* shared = std::get_if<SharedPage>(&entry)) index_.release(std::move(*shared));
  }
}

// --- containers by state
// ----------------------------------------------------------------------------

template <lifecycle::State S>
Scheduler::Request<S> Scheduler::take(std::uint32_t index) noexcept {
  auto& requests = shelf<S>();
  const auto place = static_cast<std::size_t>(records_[index].place);
  Request<S> out = std::move(requests[place]);
  if (place + 1 != requests.size()) {
    requests[place] = std::move(requests.back());
    records_[requests[place].id().index].place = static_cast<std::int32_t>(place);
  }
  requests.pop_back();
  return out;
}

template <lifecycle::State S>
void Scheduler::put(Request<S>&& request) {
  auto& requests = shelf<S>();
  records_[request.id().index].place = static_cast<std::int32_t>(requests.size());
  requests.push_back(std::move(request));
}

template <class F>
decltype(auto) Scheduler::with(std::uint32_t index, F&& f) {
  return lifecycle::visit(records_[index].state, std::forward<F>(f));
}

std::uint32_t Scheduler::new_record() {
  if (spare_.empty()) {
    records_.emplace_back();
    return static_cast<std::uint32_t>(records_.size() - 1);
  }
  const std::uint32_t index = spare_.back();
  spare_.pop_back();
  return index;
}

void Scheduler::retire(std::uint32_t index) noexcept {
  Record& record = records_[index];
  by_number_.erase(record.number);
  const std::uint32_t incarnation = record.incarnation + 1;
  record = Record{};
  record.incarnation = incarnation;
  spare_.push_back(index);
}

void Scheduler::queue(std::uint32_t index) {
  queued_.emplace(records_[index].arrival, index);
}

// --- the guards
// -------------------------------------------------------------------------------------

bool Scheduler::FirstQueued(RequestId id) const noexcept {
  return !queued_.empty() && queued_.begin()->second == id.index;
}

bool Scheduler::Wants(RequestId id) const noexcept {
  return wanted(records_[id.index]) > 0;
}

bool Scheduler::Lacks(RequestId id) const noexcept {
  const Record& record = records_[id.index];
  const std::int32_t next = std::min(wanted(record), config_.step_tokens);
  return next > 0 && record.pages * config_.page_size - record.planned < next;
}

bool Scheduler::Fits(RequestId id) const noexcept {
  // The last token is never fed back, so it needs no KV.
  return pages_for(records_[id.index].length_max - 1, config_.page_size) <= config_.pages;
}

bool Scheduler::Youngest(RequestId id) const noexcept {
  return !running_.empty() && running_.back() == id.index;
}

bool Scheduler::Alone(RequestId id) const noexcept {
  return running_.size() == 1 && running_.front() == id.index;
}

bool Scheduler::Pinned(RequestId id) const noexcept {
  return records_[id.index].pins > 0;
}

void Scheduler::moved(Action action, RequestId id, State from, State to) noexcept {
  Record& record = records_[id.index];
  record.state = to;
  const auto row = static_cast<std::size_t>(action) * kStates + static_cast<std::size_t>(from);
  ++transitions_[row * kStates + static_cast<std::size_t>(to)];
  if (!recording_) return;
  events_.push_back({action, record.number, id.incarnation, from, to});
  trace_.push_back({name(action), record.number, -1, -1, name(to)});
}

// What the move just made was about.
void Scheduler::note(PageId page, std::int64_t value) noexcept {
  if (!recording_) return;
  trace_.back().page = page;
  trace_.back().value = value;
}

// A step of no single request.
void Scheduler::trace(std::string_view action, PageId page, std::int64_t value) {
  if (recording_) trace_.push_back({action, -1, page, value, {}});
}

// --- submission
// -------------------------------------------------------------------------------------

Refusal Scheduler::submit(std::int64_t number, std::span<const Token> prompt,
                          std::int32_t max_tokens, std::string_view salt) {
  const auto length = static_cast<std::int64_t>(prompt.size()) + max_tokens;
  if (prompt.empty()) return {"prompt", "got no tokens; expected at least one"};
  if (std::ranges::any_of(prompt, [](Token token) { return token < 0; })) {
    return {"prompt", "got a negative token id; expected ids from 0"};
  }
  if (max_tokens < 1) return {"max_tokens", "expected at least 1"};
  if (length > config_.context_max) {
    return {"max_tokens", "prompt and max_tokens together exceed context_max " +
                              std::to_string(config_.context_max)};
  }
  if (by_number_.contains(number)) return {"number", "this request is alive already"};
  if (std::ssize(queued_) >= config_.waiting_max) return {"", "the queue is full", true};

  const std::uint32_t index = new_record();
  Record& record = records_[index];
  record.number = number;
  record.arrival = arrivals_++;
  record.length_max = static_cast<std::int32_t>(length);
  record.salt = salt;
  record.tokens.reserve(static_cast<std::size_t>(length));
  record.tokens.assign(prompt.begin(), prompt.end());
  by_number_.emplace(number, index);
  auto created = lifecycle::create<Scheduler>(RequestId{index, record.incarnation});
  auto verdict = lifecycle::permit_Submit(*this, created);
  if (!verdict) {
    created.abandon();
    retire(index);
    const auto pages = pages_for(static_cast<std::int32_t>(length) - 1, config_.page_size);
    return {"max_tokens", "needs " + std::to_string(pages) + " pages, the pool has " +
                              std::to_string(config_.pages)};
  }
  put(lifecycle::Submit(*this, std::move(created), std::move(verdict).take()));
  queue(index);
  return {};
}

// --- planning
// ---------------------------------------------------------------------------------------

// Positions that could be computed now: known tokens, or the one that a launched step samples.
std::int32_t Scheduler::wanted(const Record& record) const noexcept {
  if (record.step == step_) return 0;
  const std::int32_t known = record.known() - record.planned;
  if (known > 0) return known;
  return record.pins > 0 && record.planned < record.length_max - 1 ? 1 : 0;
}

bool Scheduler::decodes(const Record& record) const noexcept {
  return wanted(record) == 1;
}

std::unique_ptr<Plan> Scheduler::plan() {
  if (std::ssize(launched_) > config_.overlap) return nullptr;
  if (running_.empty() && queued_.empty()) return nullptr;
  index_.tick();
  short_ = false;
  auto plan = std::make_unique<Plan>();
  plan->step = step_;
  Ticket ticket{step_, {}};
  // Every running request can decode; prefill takes what is left, so that neither starves the
  // other.
  const auto decode_rows = std::ranges::count_if(
      running_, [this](std::uint32_t index) { return decodes(records_[index]); });
  std::int32_t budget = config_.step_tokens - static_cast<std::int32_t>(decode_rows);
  if (schedule_running(*plan, ticket, budget)) admit_waiting(*plan, ticket, budget);
  if (ticket.rows.empty()) return nullptr;
  trace("Launch", -1, step_);
  launched_.push_back(std::move(ticket));
  ++step_;
  ++counts_.steps;
  return plan;
}

// In order of arrival. False if somebody lacked a page: then nobody new comes in.
bool Scheduler::schedule_running(Plan& plan, Ticket& ticket, std::int32_t& budget) {
  for (std::size_t at = 0; at < running_.size(); ++at) {  // it may shrink from the back
    const std::uint32_t index = running_[at];
    const std::int32_t wants = wanted(records_[index]);
    const std::int32_t tokens = wants == 1 ? 1 : std::min(wants, budget);
    if (tokens < 1) continue;
    const std::int32_t before = std::ssize(plan.token_ids);
    schedule(index, tokens, plan, ticket);
    if (wants > 1) budget -= static_cast<std::int32_t>(std::ssize(plan.token_ids)) - before;
  }
  return !short_;
}

bool Scheduler::schedule(std::uint32_t index, std::int32_t tokens, Plan& plan, Ticket& ticket) {
  const std::int32_t count = acquire(index, tokens, plan);
  if (count < 1) return false;
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Schedule, S)) {
      auto verdict = lifecycle::permit_Schedule(*this, handle<S>(index));
      if (!verdict) return false;
      Record& record = records_[index];
      handle<S>(index) =
          lifecycle::Schedule(*this, std::move(handle<S>(index)), std::move(verdict).take());
      note(-1, count);
      const bool samples = record.planned + count >= record.known();
      plan.numbers.push_back(record.number);
      plan.incarnations.push_back(static_cast<std::int32_t>(record.incarnation));
      plan.slots.push_back(handle<S>(index).slot().index());
      plan.context_lens.push_back(record.planned);
      plan.sampled.push_back(samples ? 1 : 0);
      for (std::int32_t at = record.planned; at < record.planned + count; ++at) {
        plan.token_ids.push_back(at < record.known() ? record.tokens[static_cast<std::size_t>(at)]
                                                     : -1);
      }
      plan.query_start.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
      ticket.rows.push_back({index, count, samples});
      record.planned += count;
      record.step = step_;
      ++record.pins;
      return true;
    } else {
      return false;
    }
  });
}

// Pages for the next `tokens` positions; how many of them the table can then hold. A request takes
// no page while an older one lacks its own.
std::int32_t Scheduler::acquire(std::uint32_t index, std::int32_t tokens, Plan& plan) {
  return with(index, [&]<State S>() -> std::int32_t {
    if constexpr (lifecycle::can(Action::Schedule, S)) {
      const std::int32_t planned = records_[index].planned;
      const std::int32_t needed = pages_for(planned + tokens, config_.page_size);
      while (records_[index].pages < needed && !short_) {
        auto page = find_page(index, plan);
        if (!page) break;
        auto verdict = lifecycle::permit_Acquire(*this, handle<S>(index));
        if (!verdict) {
          pool_.give_back(std::move(*page));
          break;
        }
        handle<S>(index) =
            lifecycle::Acquire(*this, std::move(handle<S>(index)), std::move(verdict).take());
        note(page->id(), -1);
        const std::int32_t slot = handle<S>(index).slot().index();
        plan.page_delta.insert(plan.page_delta.end(), {slot, records_[index].pages, page->id()});
        handle<S>(index).pages().append(std::move(*page));
        ++records_[index].pages;
      }
      return std::min(tokens, records_[index].pages * config_.page_size - planned);
    } else {
      return 0;
    }
  });
}

// A free page, or the least recently used cached one, or one that the youngest gives up.
std::optional<ExclusivePage> Scheduler::find_page(std::uint32_t index, Plan& plan) {
  while (true) {
    if (auto page = pool_.take()) return page;
    if (index_.evict(pool_)) {
      trace("Evict", pool_.free_ids().back(), -1);
      ++counts_.evictions;
      continue;
    }
    short_ = true;
    if (!preempt_youngest(index, plan)) return std::nullopt;
    short_ = false;
  }
}

bool Scheduler::preempt_youngest(std::uint32_t for_whom, Plan& plan) {
  const std::uint32_t index = running_.back();
  if (index == for_whom) return false;
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Preempt, S)) {
      auto verdict = lifecycle::permit_Preempt(*this, handle<S>(index));
      if (!verdict) return false;
      running_.pop_back();
      auto out = lifecycle::Preempt(*this, take<S>(index), std::move(verdict).take());
      put(std::move(out.request));
      give_back(std::move(out.pages), std::move(out.slot));
      Record& record = records_[index];
      record.pages = record.planned = record.computed = record.published = 0;
      queue(index);
      plan.preempted.push_back(record.number);
      ++counts_.preemptions;
      return true;
    } else {
      return false;
    }
  });
}

// --- admission
// --------------------------------------------------------------------------------------

void Scheduler::admit_waiting(Plan& plan, Ticket& ticket, std::int32_t& budget) {
  while (budget > 0 && !queued_.empty() && !free_slots_.empty()) {
    const std::uint32_t index = queued_.begin()->second;
    if (!admit(index, plan)) return;
    const std::int32_t before = std::ssize(plan.token_ids);
    schedule(index, std::min(wanted(records_[index]), budget), plan, ticket);
    budget -= static_cast<std::int32_t>(std::ssize(plan.token_ids)) - before;
  }
}

// Pages that running requests have yet to take for tokens that are known: promised at admission.
// One that is planned ahead of what is known has taken them, and owes nobody any.
std::int64_t Scheduler::promised() const noexcept {
  std::int64_t pages = 0;
  for (const std::uint32_t index : running_) {
    const Record& record = records_[index];
    pages += std::max(0, pages_for(record.known(), config_.page_size) -
                             pages_for(record.planned, config_.page_size));
  }
  return pages;
}

bool Scheduler::admit(std::uint32_t index, Plan& plan) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Admit, S)) {
      auto verdict = lifecycle::permit_Admit(*this, handle<S>(index));
      if (!verdict) return false;
      Record& record = records_[index];
      PageTable pages;
      PrefixIndex::Cursor cursor = index_.find_root(record.salt);
      // The last known token is always computed: its logits are what is asked for.
      const auto size = static_cast<std::size_t>(config_.page_size);
      const std::size_t most = config_.prefix_cache ? (record.tokens.size() - 1) / size : 0;
      while (pages.size() < most &&
             index_.match(cursor, std::span(record.tokens).subspan(pages.size() * size, size),
                          pages)) {
      }
      const auto matched = static_cast<std::int32_t>(pages.size());
      const std::int64_t needs = pages_for(record.known(), config_.page_size) - matched;
      if (needs > pool_.free() + index_.unheld() - promised()) {
        while (!pages.empty()) index_.release(std::get<SharedPage>(pages.pop()));
        return false;
      }
      Slot slot(free_slots_.back());
      free_slots_.pop_back();
      for (std::int32_t at = 0; at < matched; ++at) {
        plan.page_delta.insert(plan.page_delta.end(),
                               {slot.index(), at, pages.id(static_cast<std::size_t>(at))});
      }
      plan.joined.insert(plan.joined.end(), {slot.index(), record.number});
      plan.cached.push_back(matched * config_.page_size);
      if constexpr (S == State::Waiting) {
        counts_.prefix_queries += record.known();
        counts_.prefix_hits += matched * config_.page_size;
      }
      record.pages = matched;
      record.planned = record.computed = matched * config_.page_size;
      record.published = config_.prefix_cache ? matched : std::numeric_limits<std::int32_t>::max();
      record.cursor = cursor;
      queued_.erase(queued_.begin());
      const auto place = std::ranges::upper_bound(
          running_, record.arrival, {}, [this](std::uint32_t at) { return records_[at].arrival; });
      running_.insert(place, index);
      put(lifecycle::Admit(*this, take<S>(index), std::move(verdict).take(), std::move(slot),
                           std::move(pages)));
      note(-1, matched);
      return true;
    } else {
      return false;
    }
  });
}

// --- completion
// -------------------------------------------------------------------------------------

std::string Scheduler::refuse_results(const Ticket& ticket, std::int64_t step,
                                      std::span<const std::int32_t> token_ids,
                                      std::span<const std::uint8_t> stop) const {
  if (ticket.step != step) {
    return "commit: got step " + std::to_string(step) + "; expected " +
           std::to_string(ticket.step) + ", steps complete in the order of their launch";
  }
  if (token_ids.size() != ticket.rows.size() || stop.size() != ticket.rows.size()) {
    return "commit: got " + std::to_string(token_ids.size()) + " tokens and " +
           std::to_string(stop.size()) + " stop flags; expected " +
           std::to_string(ticket.rows.size()) + ", one a row";
  }
  for (std::size_t row = 0; row < ticket.rows.size(); ++row) {
    const State state = records_[ticket.rows[row].index].state;
    const bool live = state == State::Prefilling || state == State::Decoding;
    if (live && ticket.rows[row].samples && token_ids[row] < 0) {
      return "commit: row " + std::to_string(row) + " was sampled and has no token";
    }
  }
  return {};
}

Committed Scheduler::commit(std::int64_t step, std::span<const std::int32_t> token_ids,
                            std::span<const std::uint8_t> stop) {
  Committed out;
  if (launched_.empty()) {
    out.error = "commit: no step is in flight";
    return out;
  }
  out.error = refuse_results(launched_.front(), step, token_ids, stop);
  if (!out.error.empty()) return out;
  const Ticket ticket = std::move(launched_.front());
  launched_.pop_front();
  out.accepted.assign(ticket.rows.size(), 0);
  for (std::size_t at = 0; at < ticket.rows.size(); ++at) {
    const std::size_t tokens = records_[ticket.rows[at].index].tokens.size();
    complete(ticket.rows[at], token_ids[at], stop[at] != 0, out);
    out.accepted[at] = records_[ticket.rows[at].index].tokens.size() > tokens ? 1 : 0;
    note(-1, out.accepted[at] ? token_ids[at] : -1);
  }
  trace("Complete", -1, step);
  for (const Row& row : ticket.rows) {
    publish(row.index);
    const std::int64_t number = records_[row.index].number;
    if (release(row.index)) out.released.push_back(number);
  }
  return out;
}

void Scheduler::complete(const Row& row, std::int32_t token, bool stop, Committed& out) {
  const std::uint32_t index = row.index;
  --records_[index].pins;
  records_[index].computed += row.tokens;
  with(index, [&]<State S>() {
    const auto move = [&]<State To>() {
      if constexpr (lifecycle::edge(Action::Complete, S, To)) {
        put(lifecycle::Complete<To>(*this, take<S>(index)));
      }
    };
    if constexpr (lifecycle::edge(Action::Complete, S, State::Finishing) && S != State::Finishing) {
      Record& record = records_[index];
      if (!row.samples) return move.template operator()<S>();
      record.tokens.push_back(token);
      if (!stop && record.known() < record.length_max) {
        return move.template operator()<State::Decoding>();
      }
      out.finished.emplace_back(record.number, stop ? FinishReason::Stop : FinishReason::Length);
      std::erase(running_, index);
      return move.template operator()<State::Finishing>();
    } else {
      return move.template operator()<S>();  // draining: the result is dropped
    }
  });
}

// Offer the pages that are full, computed, and whose tokens are known.
void Scheduler::publish(std::uint32_t index) {
  with(index, [&]<State S>() {
    if constexpr (lifecycle::can(Action::Publish, S)) {
      Record& record = records_[index];
      const std::int32_t full = std::min(record.computed, record.known()) / config_.page_size;
      while (record.published < full) {
        const auto at = static_cast<std::size_t>(record.published);
        const auto size = static_cast<std::size_t>(config_.page_size);
        if (record.published == 0) record.cursor = index_.root(record.salt);
        handle<S>(index).pages().replace(at, [&](ExclusivePage&& page) {
          return index_.publish(record.cursor, std::span(record.tokens).subspan(at * size, size),
                                std::move(page));
        });
        if (PrefixIndex::ended(record.cursor)) {
          record.published = std::numeric_limits<std::int32_t>::max();
          return;
        }
        ++record.published;
        handle<S>(index) = lifecycle::Publish(*this, std::move(handle<S>(index)));
        note(handle<S>(index).pages().id(at), -1);
      }
    }
  });
}

bool Scheduler::release(std::uint32_t index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Release, S)) {
      auto verdict = lifecycle::permit_Release(*this, handle<S>(index));
      if (!verdict) return false;
      auto out = lifecycle::Release(*this, take<S>(index), std::move(verdict).take());
      give_back(std::move(out.pages), std::move(out.slot));
      retire(index);
      return true;
    } else {
      return false;
    }
  });
}

void Scheduler::give_back(PageTable&& pages, Slot&& slot) {
  empty(pages);
  free_slots_.push_back(slot.index());
}

bool Scheduler::abort(std::int64_t number) {
  const auto found = by_number_.find(number);
  if (found == by_number_.end()) return false;
  const std::uint32_t index = found->second;
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::edge(Action::Abort, S, State::Aborted)) {
      queued_.erase({records_[index].arrival, index});
      static_cast<void>(lifecycle::Abort(*this, take<S>(index)));
      retire(index);
      return true;
    } else if constexpr (lifecycle::can(Action::Abort, S)) {
      std::erase(running_, index);
      put(lifecycle::Abort(*this, take<S>(index)));
      release(index);
      return true;
    } else {
      return false;
    }
  });
}

}  // namespace tokenspeed
