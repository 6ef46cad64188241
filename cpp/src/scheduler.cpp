#include "scheduler.hpp"

#include <algorithm>
#include <cassert>
#include <limits>

namespace tokenspeed {

using lifecycle::State;

// --- configuration -----------------------------------------------------------------------------

namespace {
// Those that see all come first.
std::vector<CacheGroup> cache_groups(const SchedulerConfig& config) {
  std::vector<CacheGroup> out(static_cast<std::size_t>(config.full_groups));
  out.resize(out.size() + static_cast<std::size_t>(config.window_groups),
             CacheGroup{config.window});
  return out;
}
}  // namespace

ControlConfig Scheduler::constants(const SchedulerConfig& config) {
  return {config.page_size,         config.pages,       config.slots,
          config.step_tokens,       config.overlap + 1, config.prefix_cache,
          config.session_pages_max, config.host_pages,  config.draft_tokens,
          cache_groups(config)};
}

std::string Setting::refuse(const std::string& given) const {
  return std::string(name) + ": got " + given + "; expected " + std::to_string(low) + " to " +
         std::to_string(high);
}

// Each alone, then those that depend on each other.
std::string Scheduler::invalid(const SchedulerConfig& config) {
  for (const Setting& setting : kSettings) {
    const std::int32_t value = config.*setting.value;
    if (value < setting.low || value > setting.high) return setting.refuse(std::to_string(value));
  }
  const auto expected = [](const char* field, std::int32_t value, const std::string& what) {
    return std::string(field) + ": got " + std::to_string(value) + "; expected " + what;
  };
  if (config.step_tokens < config.slots) {
    return expected("step_tokens", config.step_tokens,
                    "at least " + std::to_string(config.slots) + ", one for each of the slots");
  }
  if (config.page_size > config.step_tokens) {
    return expected("page_size", config.page_size,
                    "at most step_tokens (" + std::to_string(config.step_tokens) + ")");
  }
  if (config.host_pages > 0 && !config.prefix_cache) {
    return expected("host_pages", config.host_pages,
                    "0 without the prefix cache: only cached pages are kept there");
  }
  constexpr std::int32_t kTokensMax = std::numeric_limits<std::int32_t>::max();
  if (config.pages > kTokensMax / config.page_size) {
    return expected("pages", config.pages,
                    "at most " + std::to_string(kTokensMax / config.page_size) + " of " +
                        std::to_string(config.page_size) + " tokens, 32 bits of tokens in all");
  }
  return Control::invalid(constants(config));
}

// As many spare plans as there may be steps in flight, and one that is being made.
Scheduler::Scheduler(const SchedulerConfig& config)
    : config_(config),
      control_(constants(config)),
      plans_(static_cast<std::size_t>(config.overlap) + 2),
      commits_(2),
      works_(static_cast<std::size_t>(config.overlap) + 1) {
  outcomes_.reserve(static_cast<std::size_t>(config.slots));
  guessing_.reserve(static_cast<std::size_t>(config.slots));
  if (config.host_pages > 0) to_store_.reserve(static_cast<std::size_t>(config.pages));
}

void Plan::reserve(std::size_t rows, std::size_t tokens, std::size_t groups) {
  for (auto* row : {&incarnations, &slots, &context_lens, &cached, &drafts}) {
    row->reserve(rows);
  }
  numbers.reserve(rows);
  preempted.reserve(rows);
  sampled.reserve(rows);
  query_start.reserve(rows + 1);
  token_ids.reserve(tokens);
  page_delta.reserve(3 * rows * groups);
  joined.reserve(2 * rows);
  stores.reserve(3 * rows);
}

void Plan::clear() noexcept {
  for (auto* row :
       {&incarnations, &slots, &token_ids, &context_lens, &page_delta, &cached, &drafts}) {
    row->clear();
  }
  for (auto* row : {&numbers, &joined, &preempted, &stores, &loads}) row->clear();
  sampled.clear();
  query_start.resize(1);  // the 0
}

void Committed::reserve(std::size_t rows) {
  accepted.reserve(rows);
  taken.reserve(rows);
  finished.reserve(rows);
  released.reserve(rows);
}

void Committed::clear() noexcept {
  accepted.clear();
  taken.clear();
  finished.clear();
  released.clear();
  error.clear();
}

// --- submission --------------------------------------------------------------------------------

Refusal Scheduler::submit(std::int64_t number, std::span<const Token> prompt,
                          std::int32_t max_tokens, std::string_view salt, const Turn& turn,
                          std::int32_t priority) {
  const auto length = static_cast<std::int64_t>(prompt.size()) + max_tokens;
  if (prompt.empty()) return {"prompt", "got no tokens; expected at least one"};
  // The sign of all of them at once: a loop without a way out is one that compilers make wide.
  Token signs = 0;
  for (const Token token : prompt) signs |= token;
  if (signs < 0) {
    return {"prompt", "got a negative token id; expected ids from 0"};
  }
  if (max_tokens < 1) return {"max_tokens", "expected at least 1"};
  if (length > config_.context_max) {
    return {"max_tokens", "prompt and max_tokens together exceed context_max " +
                              std::to_string(config_.context_max)};
  }
  if (turn.keep_us < 0 || turn.keep_us > kKeepMax) {
    return {"keep_us",
            "got " + std::to_string(turn.keep_us) + "; expected 0 to " + std::to_string(kKeepMax)};
  }
  if (priority < -kPriorityMax || priority > kPriorityMax) {
    return {"priority", "got " + std::to_string(priority) + "; expected " +
                            std::to_string(-kPriorityMax) + " to " + std::to_string(kPriorityMax)};
  }
  if (control_.find(number)) return {"number", "this request is alive already"};
  if (std::ssize(control_.queue()) >= config_.waiting_max) return {"", "the queue is full", true};
  const std::int64_t patience = kArrivals * (std::int64_t{priority} + kPriorityMax);
  if (!control_.submit(number, prompt, static_cast<std::int32_t>(length), salt, turn, patience)) {
    const auto pages = control_.pages_needed(static_cast<std::int32_t>(length) - 1);
    return {"max_tokens", "needs " + std::to_string(pages) + " pages, the pool has " +
                              std::to_string(config_.pages)};
  }
  if (!prefetches_.empty()) cancel_prefetch(turn.session, false);
  return {};
}

// --- planning ----------------------------------------------------------------------------------

PlanPointer Scheduler::plan() {
  if (control_.launched().full()) return {};
  if (control_.running().empty() && control_.queue().empty() && to_store_.empty() &&
      !prefetching()) {
    return {};
  }
  short_ = false;
  PlanPointer plan = plans_.take([this](Plan& made) {
    made.reserve(static_cast<std::size_t>(config_.slots),
                 static_cast<std::size_t>(config_.step_tokens),
                 static_cast<std::size_t>(config_.full_groups + config_.window_groups));
  });
  plan->clear();
  plan->step = control_.steps();
  work_ = {};
  Allowance left = allowance();
  if (schedule_running(*plan, left)) admit_waiting(*plan, left);
  if (!short_ && config_.host_pages > 0) fetch_ahead(*plan);
  if (!guessing_.empty()) guess_all(*plan);
  if (!prefetches_.empty()) prefetch_all(*plan);
  if (!to_store_.empty()) store(*plan);
  if (control_.launch()) {
    work_of(plan->step) = work_;
    ++counts_.steps;
    return plan;
  }
  assert(plan->joined.empty());
  plan->step = -1;
  return plan->stores.empty() && plan->loads.empty() ? PlanPointer() : std::move(plan);
}

// Every running request can decode; drafts take half of what is left of the step at most, prefill
// what the step, and the latency budget of those who decode, leave of it: so that none starves.
Allowance Scheduler::allowance() noexcept {
  Work decode;
  std::int32_t drafts = 0;
  for (const RequestIndex index : control_.running()) {
    if (control_.wanted(index) == 1) decode.add(1, control_.record(index).planned);
    drafts += draftable(index);
  }
  const std::int32_t beside = config_.step_tokens - decode.decode_rows;
  drafts_left_ = std::min(drafts, beside / 2);
  decode.prefill_tokens += drafts_left_;
  const std::int32_t tokens = beside - drafts_left_;
  if (config_.itl_budget_us == 0 || decode.decode_rows == 0) return Allowance(tokens);
  const double within_us = static_cast<double>(config_.itl_budget_us) / model_.margin();
  return {tokens, model_, within_us - model_.predict_us(decode)};
}

// By rank. False if somebody found no page: then nobody new comes in.
bool Scheduler::schedule_running(Plan& plan, Allowance& left) {
  for (std::size_t at = 0; at < control_.running().size(); ++at) {  // it may shrink from the back
    const RequestIndex index = control_.running()[at];
    const std::int32_t wants = control_.wanted(index);
    if (wants == 1) decode(index, plan);
    if (wants > 1 && !left.empty()) prefill(index, left, plan);
  }
  return !short_;
}

void Scheduler::prefill(RequestIndex index, Allowance& left, Plan& plan) {
  const std::int32_t context = control_.record(index).planned;
  const std::int32_t tokens = yields(index) ? 1 : left.grant(control_.wanted(index), context);
  left.spend(schedule(index, tokens, plan), context);
}

// Does somebody wait who comes before it by rank, and who could be let in? Then one token is enough
// for now: with none, a request lacks its pages, which keeps everybody out.
bool Scheduler::yields(RequestIndex index) {
  if (control_.queue().empty() || !control_.SlotFree()) return false;
  const auto& [rank, head] = *control_.queue().begin();
  return rank < control_.record(index).rank && fits(head);
}

// As many of `tokens` as there are pages for; how many that is.
std::int32_t Scheduler::schedule(RequestIndex index, std::int32_t tokens, Plan& plan) {
  const std::int32_t count = acquire(index, tokens, plan);
  if (!control_.schedule(index, count)) return 0;
  write_row(plan);
  work_.add(count, control_.planned().back().from);
  return count;
}

// The last one of the plan, and the pages that nobody has heard of yet: one that a request took
// when it did not get one of each group is told with its next row.
void Scheduler::write_row(Plan& plan) {
  const Row& row = control_.planned().back();
  const RequestIndex index = row.index;
  const Record& record = control_.record(index);
  plan.numbers.push_back(record.number);
  plan.incarnations.push_back(static_cast<std::int32_t>(record.incarnation));
  plan.slots.push_back(control_.slot(index));
  for (std::int32_t at = control_.tell_pages(index); at < record.pages; ++at) {
    const PageId page = control_.table(index)->id(static_cast<std::size_t>(at));
    if (page >= 0) plan.page_delta.insert(plan.page_delta.end(), {plan.slots.back(), at, page});
  }
  plan.context_lens.push_back(row.from);
  plan.sampled.push_back(row.samples ? 1 : 0);
  plan.drafts.push_back(row.drafts);
  const std::int32_t known = std::min(row.tokens, record.known() - row.from);
  if (known == 1 && row.from + 1 == record.known()) {
    plan.token_ids.push_back(record.last);
  } else if (known > 0) {
    const Token* first = record.tokens.data() + row.from;
    plan.token_ids.insert(plan.token_ids.end(), first, first + known);
  } else {
    plan.token_ids.push_back(-1);  // the one that a step in flight samples
  }
  if (row.drafts > 0) {
    const auto draft = record.draft.begin();
    plan.token_ids.insert(plan.token_ids.end(), draft, draft + row.drafts);
  }
  plan.query_start.push_back(static_cast<std::int32_t>(plan.token_ids.size()));
}

// Pages for the next `tokens` positions; how many of them the table can then hold. A request takes
// no page while an older one lacks its own.
std::int32_t Scheduler::acquire(RequestIndex index, std::int32_t tokens, Plan& plan) {
  const Record& record = control_.record(index);
  const std::int32_t end = record.planned + tokens;
  while (record.holds < end && !short_ && find_page(index, plan)) {
    if (!control_.acquire(index, *control_.pool().next())) break;
  }
  return std::min(tokens, record.holds - record.planned);
}

// Is a page free? If not, the cached one goes that is least likely to be missed, or the last
// request by rank gives up its own.
bool Scheduler::find_page(RequestIndex for_whom, Plan& plan) {
  while (control_.pool().free() == 0) {
    if (!evict_one() && !preempt_last(for_whom, plan)) {
      short_ = true;
      return false;
    }
  }
  return true;
}

bool Scheduler::evict_one() {
  const auto page = control_.index().next_evictable();
  if (!page) return false;
  control_.evict(*page);
  ++counts_.evictions;
  return true;
}

bool Scheduler::preempt_last(RequestIndex for_whom, Plan& plan) {
  const RequestIndex index = control_.running().back();
  if (index == for_whom) return false;
  const std::size_t before = to_store_.size();
  want_all_stored(index);
  if (!control_.preempt(index)) {
    to_store_.resize(before);
    return false;
  }
  plan.preempted.push_back(control_.record(index).number);
  ++counts_.preemptions;
  return true;
}

// --- admission ---------------------------------------------------------------------------------

void Scheduler::admit_waiting(Plan& plan, Allowance& left) {
  while (!left.empty() && !control_.queue().empty()) {
    const RequestIndex index = control_.queue().begin()->second;
    if (!admit(index, plan)) return;
    prefill(index, left, plan);
  }
}

// Free pages, and those that would be for the asking, less what is promised. A page that is being
// loaded will be one of them.
std::int64_t Scheduler::spare_pages() const noexcept {
  return control_.pool().free() + control_.index().unheld() + control_.host().loading() -
         control_.promised();
}

// How many of these a request takes if `held` of its leading pages are held by others already.
std::int64_t Scheduler::lacks(RequestIndex index, std::int32_t held) const noexcept {
  return control_.pages_at_once(control_.record(index).known()) - held;
}

// Does what was found when it did not fit still show that it does not? Costs nothing while no page
// becomes held; then it looks at one page more. With gaps: while none on its path comes, goes or
// becomes held; then it is looked up again.
bool Scheduler::still_held_back(RequestIndex index, HeldBack& known) const {
  if (known.arrival != control_.record(index).arrival) return false;
  if (known.gained != gained()) {
    known.gained = gained();
    if (control_.gaps() || !control_.deepen(known.held, index)) known.arrival = -1;
  }
  return known.arrival >= 0 && lacks(index, known.held.pages) > spare_pages();
}

bool Scheduler::fits(RequestIndex index) {
  if (still_held_back(index, held_back_)) return false;
  const PrefixIndex::Found& found = control_.cached(index);
  const bool fits = lacks(index, found.held) <= spare_pages();
  const std::int64_t arrival = fits ? -1 : control_.record(index).arrival;
  if (!fits && control_.gaps()) control_.watch(index);
  held_back_ = {arrival, gained(), control_.index().held(found)};
  return fits;
}

bool Scheduler::admit(RequestIndex index, Plan& plan) {
  const Record& record = control_.record(index);
  const bool first = record.state == State::Waiting;
  // The two that say no most often come first: then no prefix is looked up.
  if (!control_.SlotFree() || !control_.NoneLacks()) return false;
  if (control_.host().total() > 0 && fetching(index)) return false;
  if (!fits(index)) return false;
  if (control_.host().total() > 0 && fetch(index, true, plan)) return false;
  // What copies touch will be free, but its first row wants a page now: nobody hears of a request
  // in a step that has no row.
  if (control_.host().total() > 0 && !page_beside(control_.cached(index).at[0])) return false;
  if (!control_.admit(index)) return false;
  plan.joined.insert(plan.joined.end(), {control_.slot(index), record.number});
  plan.cached.push_back(record.planned);
  if (first) {
    counts_.prefix_queries += record.known();
    counts_.prefix_hits += record.planned;
    if (const Fetch* fetch = fetch_of(record.arrival)) {
      counts_.prefix_hits_host += std::max(0, record.planned - fetch->before * config_.page_size);
    }
  }
  std::erase_if(fetches_, [&](const Fetch& each) { return each.arrival == record.arrival; });
  return true;
}

// --- completion --------------------------------------------------------------------------------

std::string Scheduler::refuse_results(const Ticket& ticket, std::int64_t step,
                                      std::span<const Token> token_ids,
                                      std::span<const std::uint8_t> stop,
                                      std::span<const std::uint8_t> awaits_tool) const {
  if (ticket.step != step) {
    return "commit: got step " + std::to_string(step) + "; expected " +
           std::to_string(ticket.step) + ", steps complete in the order of their launch";
  }
  if (token_ids.size() != ticket.results || stop.size() != ticket.rows.size()) {
    const std::string rows = std::to_string(ticket.rows.size());
    const std::string tokens = std::to_string(ticket.results);
    return "commit: got " + std::to_string(token_ids.size()) + " tokens and " +
           std::to_string(stop.size()) + " stop flags; expected " +
           (ticket.results == ticket.rows.size()
                ? rows + ", one a row"
                : tokens + " and " + rows + ", one a row, and of tokens one more a draft");
  }
  if (!awaits_tool.empty() && awaits_tool.size() != ticket.rows.size()) {
    return "commit: got " + std::to_string(awaits_tool.size()) +
           " flags of awaits_tool; expected " + std::to_string(ticket.rows.size()) +
           ", one a row, or none";
  }
  for (std::size_t row = 0; row < ticket.rows.size(); ++row) {
    const auto run = token_ids.first(static_cast<std::size_t>(ticket.rows[row].drafts) + 1);
    token_ids = token_ids.subspan(run.size());
    if (const char* why = control_.wrong_run(ticket.rows[row], run)) {
      return "commit: row " + std::to_string(row) + " " + why;
    }
  }
  return {};
}

CommittedPointer Scheduler::commit(std::int64_t step, std::span<const Token> token_ids,
                                   std::span<const std::uint8_t> stop, std::int64_t duration_us,
                                   std::span<const std::uint8_t> awaits_tool) {
  CommittedPointer out = commits_.take(
      [this](Committed& made) { made.reserve(static_cast<std::size_t>(config_.slots)); });
  out->clear();
  if (control_.launched().empty()) {
    out->error = "commit: no step is in flight";
    return out;
  }
  out->error = refuse_results(control_.launched().front(), step, token_ids, stop, awaits_tool);
  if (!out->error.empty()) return out;
  if (config_.itl_budget_us > 0 && duration_us > 0) {
    model_.observe(work_of(step), static_cast<double>(duration_us));
  }
  outcomes_.clear();
  control_.complete(token_ids, stop, outcomes_);
  for (std::size_t row = 0; row < outcomes_.size(); ++row) {
    const auto& [index, accepted, finished, drafts] = outcomes_[row];
    const std::int64_t number = control_.record(index).number;
    out->accepted.push_back(accepted > 0 ? 1 : 0);
    out->taken.push_back(accepted);
    if (drafts > 0) settle(outcomes_[row]);
    if (finished) {
      out->finished.emplace_back(number, stop[row] ? FinishReason::Stop : FinishReason::Length);
    }
    if (!awaits_tool.empty() && awaits_tool[row]) control_.awaits_tool(index);
    publish(index);
    while (control_.slide(index)) {
    }
    if (control_.release(index)) out->released.push_back(number);
  }
  return out;
}

bool Scheduler::abort(std::int64_t number) {
  const auto index = control_.find(number);
  if (!index || !control_.abort(*index)) return false;
  if (control_.find(number)) control_.release(*index);  // if no step touches its pages
  return true;
}

Cleared Scheduler::clear_cache() {
  for (const HostPage block : control_.host().moving()) {
    if (control_.host()[block].taken) condemned_.push_back(block);
  }
  to_store_.clear();
  prefetches_.clear();
  const Cleared out = control_.clear();
  counts_.evictions += out.evicted;
  return out;
}

// --- looking -----------------------------------------------------------------------------------

Stats Scheduler::stats() const noexcept {
  Stats out = counts_;
  out.running = std::ssize(control_.running());
  out.waiting = std::ssize(control_.queue());
  out.draining = static_cast<std::int64_t>(control_.alive()) - out.running - out.waiting;
  out.pages_total = control_.pool().total();
  out.pages_free = control_.pool().free();
  out.pages_cached = control_.index().unheld();
  out.pages_kept = control_.index().retention().kept();
  out.prefix_looks = static_cast<std::int64_t>(control_.index().looks());
  out.prefix_nodes = static_cast<std::int64_t>(control_.index().nodes());
  out.sessions = static_cast<std::int64_t>(control_.sessions().size());
  out.host_pages_total = control_.host().total();
  out.host_pages_free = control_.host().free();
  out.host_pages_cached = control_.host().present();
  return out;
}

bool Scheduler::idle() const noexcept {
  return control_.alive() == 0 && control_.launched().empty() && to_store_.empty() &&
         control_.host().moving().empty();
}

std::vector<std::string> Scheduler::check() const {
  std::vector<std::string> wrong = control_.check();
  if (control_.queue().empty()) return wrong;
  const RequestIndex head = control_.queue().begin()->second;
  HeldBack known = held_back_;
  const bool fits = lacks(head, control_.look(head).held) <= spare_pages();
  if (fits && still_held_back(head, known)) {
    wrong.push_back("the head of the queue is held back, though it would fit");
  }
  return wrong;
}

const std::vector<Token>* Scheduler::tokens(std::int64_t number) const {
  const auto index = control_.find(number);
  return index ? &control_.record(*index).tokens : nullptr;
}

}  // namespace tokenspeed
