#include "scheduler.hpp"

#include <algorithm>

namespace tokenspeed {

using lifecycle::State;

// --- configuration
// ----------------------------------------------------------------------------------

ControlConfig Scheduler::constants(const SchedulerConfig& config) {
  return {config.page_size,   config.pages,       config.slots,
          config.step_tokens, config.overlap + 1, config.prefix_cache};
}

std::string Scheduler::invalid(const SchedulerConfig& config) {
  const auto expected = [](const char* field, std::int32_t value, const std::string& what) {
    return std::string(field) + ": got " + std::to_string(value) + "; expected " + what;
  };
  if (config.waiting_max < 1) return expected("waiting_max", config.waiting_max, "at least 1");
  if (config.context_max < 2) return expected("context_max", config.context_max, "at least 2");
  if (config.overlap < 0 || config.overlap > kOverlapMax) {
    return expected("overlap", config.overlap, "0 to " + std::to_string(kOverlapMax));
  }
  // One token for each slot; before Control looks at it, under a name that a caller does not know.
  if (config.step_tokens < std::max(config.slots, 1)) {
    return expected(
        "step_tokens", config.step_tokens,
        "at least " + std::to_string(std::max(config.slots, 1)) + ", one for each of the slots");
  }
  return Control::invalid(constants(config));
}

Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(config), control_(constants(config)) {}

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
  if (control_.find(number)) return {"number", "this request is alive already"};
  if (std::ssize(control_.queue()) >= config_.waiting_max) return {"", "the queue is full", true};
  if (!control_.submit(number, prompt, static_cast<std::int32_t>(length), salt)) {
    const auto pages = pages_for(static_cast<std::int32_t>(length) - 1, config_.page_size);
    return {"max_tokens", "needs " + std::to_string(pages) + " pages, the pool has " +
                              std::to_string(config_.pages)};
  }
  return {};
}

// --- planning
// ---------------------------------------------------------------------------------------

std::unique_ptr<Plan> Scheduler::plan() {
  if (std::ssize(control_.launched()) > config_.overlap) return nullptr;
  if (control_.running().empty() && control_.queue().empty()) return nullptr;
  control_.tick();
  short_ = false;
  auto plan = std::make_unique<Plan>();
  plan->step = control_.steps();
  // Every running request can decode; prefill takes what is left, so that neither starves the
  // other.
  const auto decode_rows = std::ranges::count_if(
      control_.running(), [this](RequestIndex index) { return control_.wanted(index) == 1; });
  std::int32_t budget = config_.step_tokens - static_cast<std::int32_t>(decode_rows);
  if (schedule_running(*plan, budget)) admit_waiting(*plan, budget);
  if (!control_.launch()) return nullptr;
  ++counts_.steps;
  return plan;
}

// In order of arrival. False if somebody found no page: then nobody new comes in.
bool Scheduler::schedule_running(Plan& plan, std::int32_t& budget) {
  for (std::size_t at = 0; at < control_.running().size(); ++at) {  // it may shrink from the back
    const RequestIndex index = control_.running()[at];
    const std::int32_t wants = control_.wanted(index);
    const std::int32_t tokens = wants == 1 ? 1 : std::min(wants, budget);
    if (tokens < 1) continue;
    const std::int32_t scheduled = schedule(index, tokens, plan);
    if (wants > 1) budget -= scheduled;
  }
  return !short_;
}

// As many of `tokens` as there are pages for; how many that is.
std::int32_t Scheduler::schedule(RequestIndex index, std::int32_t tokens, Plan& plan) {
  const std::int32_t count = acquire(index, tokens, plan);
  if (!control_.schedule(index, count)) return 0;
  const Record& record = control_.record(index);
  const Row& row = control_.planned().back();
  plan.numbers.push_back(record.number);
  plan.incarnations.push_back(static_cast<std::int32_t>(record.incarnation));
  plan.slots.push_back(control_.slot(index));
  plan.context_lens.push_back(row.from);
  plan.sampled.push_back(row.samples ? 1 : 0);
  for (std::int32_t at = row.from; at < row.from + count; ++at) {
    plan.token_ids.push_back(at < record.known() ? record.tokens[static_cast<std::size_t>(at)]
                                                 : -1);
  }
  plan.query_start.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
  return count;
}

// Pages for the next `tokens` positions; how many of them the table can then hold. A request takes
// no page while an older one lacks its own.
std::int32_t Scheduler::acquire(RequestIndex index, std::int32_t tokens, Plan& plan) {
  const Record& record = control_.record(index);
  const std::int32_t needed = pages_for(record.planned + tokens, config_.page_size);
  while (record.pages < needed && !short_ && find_page(index, plan)) {
    const PageId page = *control_.pool().next();
    if (!control_.acquire(index, page)) break;
    plan.page_delta.insert(plan.page_delta.end(), {control_.slot(index), record.pages - 1, page});
  }
  return std::min(tokens, record.pages * config_.page_size - record.planned);
}

// Is a page free? If not, the least recently used cached one goes, or the youngest request gives up
// its own.
bool Scheduler::find_page(RequestIndex for_whom, Plan& plan) {
  while (control_.pool().free() == 0) {
    if (const auto page = control_.index().oldest_evictable()) {
      control_.evict(*page);
      ++counts_.evictions;
    } else if (!preempt_youngest(for_whom, plan)) {
      short_ = true;
      return false;
    }
  }
  return true;
}

bool Scheduler::preempt_youngest(RequestIndex for_whom, Plan& plan) {
  const RequestIndex index = control_.running().back();
  if (index == for_whom || !control_.preempt(index)) return false;
  plan.preempted.push_back(control_.record(index).number);
  ++counts_.preemptions;
  return true;
}

// --- admission
// --------------------------------------------------------------------------------------

void Scheduler::admit_waiting(Plan& plan, std::int32_t& budget) {
  while (budget > 0 && !control_.queue().empty()) {
    const RequestIndex index = control_.queue().begin()->second;
    if (!admit(index, plan)) return;
    budget -= schedule(index, std::min(control_.wanted(index), budget), plan);
  }
}

// Pages that running requests have yet to take for tokens that are known: promised at admission.
// One that is planned ahead of what is known has taken them, and owes nobody any.
std::int64_t Scheduler::promised() const noexcept {
  std::int64_t pages = 0;
  for (const RequestIndex index : control_.running()) {
    const Record& record = control_.record(index);
    pages += std::max(0, pages_for(record.known(), config_.page_size) -
                             pages_for(record.planned, config_.page_size));
  }
  return pages;
}

bool Scheduler::admit(RequestIndex index, Plan& plan) {
  const Record& record = control_.record(index);
  const bool first = record.state == State::Waiting;
  const auto [pages, unheld] = control_.cached(index);
  const std::int64_t left = control_.pool().free() + control_.index().unheld() - unheld;
  if (pages_for(record.known(), config_.page_size) - pages > left - promised()) return false;
  if (!control_.admit(index)) return false;
  const std::int32_t slot = control_.slot(index);
  for (std::int32_t at = 0; at < record.pages; ++at) {
    const PageId page = control_.table(index)->id(static_cast<std::size_t>(at));
    plan.page_delta.insert(plan.page_delta.end(), {slot, at, page});
  }
  plan.joined.insert(plan.joined.end(), {slot, record.number});
  plan.cached.push_back(record.planned);
  if (first) {
    counts_.prefix_queries += record.known();
    counts_.prefix_hits += record.planned;
  }
  return true;
}

// --- completion
// -------------------------------------------------------------------------------------

std::string Scheduler::refuse_results(const Ticket& ticket, std::int64_t step,
                                      std::span<const Token> token_ids,
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
    const State state = control_.record(ticket.rows[row].index).state;
    const bool live = state == State::Prefilling || state == State::Decoding;
    if (live && ticket.rows[row].samples && token_ids[row] < 0) {
      return "commit: row " + std::to_string(row) + " was sampled and has no token";
    }
  }
  return {};
}

Committed Scheduler::commit(std::int64_t step, std::span<const Token> token_ids,
                            std::span<const std::uint8_t> stop) {
  Committed out;
  if (control_.launched().empty()) {
    out.error = "commit: no step is in flight";
    return out;
  }
  out.error = refuse_results(control_.launched().front(), step, token_ids, stop);
  if (!out.error.empty()) return out;
  outcomes_.clear();
  control_.complete(token_ids, stop, outcomes_);
  for (std::size_t row = 0; row < outcomes_.size(); ++row) {
    const auto& [index, accepted, finished] = outcomes_[row];
    const std::int64_t number = control_.record(index).number;
    out.accepted.push_back(accepted ? 1 : 0);
    if (finished) {
      out.finished.emplace_back(number, stop[row] ? FinishReason::Stop : FinishReason::Length);
    }
    while (control_.publish(index)) {
    }
    if (control_.release(index)) out.released.push_back(number);
  }
  return out;
}

bool Scheduler::abort(std::int64_t number) {
  const auto index = control_.find(number);
  if (!index || !control_.abort(*index)) return false;
  if (control_.find(number)) control_.release(*index);  // if no step touches its pages
  return true;
}

// --- looking
// ----------------------------------------------------------------------------------------

Stats Scheduler::stats() const noexcept {
  Stats out = counts_;
  out.running = std::ssize(control_.running());
  out.waiting = std::ssize(control_.queue());
  out.draining = static_cast<std::int64_t>(control_.alive()) - out.running - out.waiting;
  out.pages_total = control_.pool().total();
  out.pages_free = control_.pool().free();
  out.pages_cached = control_.index().unheld();
  return out;
}

bool Scheduler::idle() const noexcept {
  return control_.alive() == 0 && control_.launched().empty();
}

const std::vector<Token>* Scheduler::tokens(std::int64_t number) const {
  const auto index = control_.find(number);
  return index ? &control_.record(*index).tokens : nullptr;
}

}  // namespace tokenspeed
