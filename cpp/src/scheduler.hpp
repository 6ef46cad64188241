// When things happen: continuous batching over the actions of `Control`. Rule: single-threaded and
// deterministic; no clock, no randomness; the same calls give the same plans. *Whether* something
// may happen is never decided here: an action that is refused has not happened.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "control.hpp"
#include "cost_model.hpp"
#include "recycler.hpp"

namespace tokenspeed {

struct SchedulerConfig {
  std::int32_t page_size = 16;
  std::int32_t pages = 0;
  std::int32_t slots = 64;
  std::int32_t waiting_max = 1024;
  std::int32_t step_tokens = 512;  // input tokens of a step, prefill and decode together
  std::int32_t context_max = 0;    // prompt and output tokens of a request
  std::int32_t overlap = 0;        // steps launched beyond the one that is awaited
  bool prefix_cache = true;
  std::int32_t itl_budget_us = 0;      // of a step with decoding rows; 0: they wait for any prefill
  std::int32_t session_pages_max = 0;  // pages kept by the wish of sessions, at most
  std::int32_t host_pages = 0;         // a second home for cached pages; 0: there is none
  std::int32_t draft_tokens = 0;       // guesses of a request in a step, at most
  std::int32_t window = 0;             // tokens that one sees, itself included; 0: all before it
  std::int32_t full_groups = 0;        // cache groups whose layers see all, whatever the window
  std::int32_t window_groups = 1;      // cache groups whose layers have the window
};

// A number of the configuration: its name, where it is, and from what to what it may be. Within
// these bounds no sum or product of sizes leaves 32 bits.
struct Setting {
  std::string_view name;
  std::int32_t SchedulerConfig::* value;
  std::int32_t low;
  std::int32_t high;
  // The refusal of what was given for it.
  std::string refuse(const std::string& given) const;
};
inline constexpr Setting kSettings[] = {
    {"page_size", &SchedulerConfig::page_size, 1, 1 << 16},
    {"pages", &SchedulerConfig::pages, 1, 1 << 24},
    {"slots", &SchedulerConfig::slots, 1, 1 << 16},
    {"waiting_max", &SchedulerConfig::waiting_max, 1, 1 << 24},
    {"step_tokens", &SchedulerConfig::step_tokens, 1, 1 << 24},
    {"context_max", &SchedulerConfig::context_max, 2, 1 << 24},
    {"host_pages", &SchedulerConfig::host_pages, 0, 1 << 24},
    {"window", &SchedulerConfig::window, 0, 1 << 24},
    {"full_groups", &SchedulerConfig::full_groups, 0, kGroupsMax / 2},
    {"window_groups", &SchedulerConfig::window_groups, 1, kGroupsMax / 2},
    {"overlap", &SchedulerConfig::overlap, 0, 64},
    {"itl_budget_us", &SchedulerConfig::itl_budget_us, 0, 60'000'000},
    {"draft_tokens", &SchedulerConfig::draft_tokens, 0, 1 << 10},
    {"session_pages_max", &SchedulerConfig::session_pages_max, 0, 1 << 24},
};

// Why a request was not taken; `field` is empty if it was.
struct Refusal {
  std::string field;
  std::string message;
  bool queue_full = false;
  bool refused() const noexcept { return !field.empty() || queue_full; }
};

// One step, as plain arrays in row order. See plan.py for their meaning.
struct Plan {
  std::int64_t step = 0;
  std::vector<std::int64_t> numbers;
  std::vector<std::int32_t> incarnations;
  std::vector<std::int32_t> slots;
  std::vector<std::int32_t> query_start{0};
  std::vector<std::int32_t> token_ids;
  std::vector<std::int32_t> context_lens;
  std::vector<std::uint8_t> sampled;
  std::vector<std::int32_t> drafts;
  std::vector<std::int32_t> page_delta;  // [changes, 3]: slot, index of all groups in turn, page
  std::vector<std::int64_t> joined;      // [joined, 2]: slot, number
  std::vector<std::int32_t> cached;      // [joined]: prompt tokens found in the prefix cache
  std::vector<std::int64_t> preempted;
  std::vector<std::int64_t> stores;  // [copies, 3]: ticket, device page, host page
  std::vector<std::int64_t> loads;   // [copies, 3]: likewise

  // Makes room for any decode step with so many cache groups, and for prefill of as many tokens.
  void reserve(std::size_t rows, std::size_t tokens, std::size_t groups);
  void clear() noexcept;
};
using PlanPointer = Recycler<Plan>::Pointer;

enum class FinishReason : std::uint8_t { Stop, Length };

// What a completed step changed.
struct Committed {
  std::vector<std::uint8_t> accepted;  // by row: its token was taken, or several
  std::vector<std::int32_t> taken;     // by row: how many
  std::vector<std::pair<std::int64_t, FinishReason>> finished;
  std::vector<std::int64_t> released;  // their pages are back
  std::string error;                   // not empty: the batch was refused whole

  void reserve(std::size_t rows);
  void clear() noexcept;
};
using CommittedPointer = Recycler<Committed>::Pointer;

// What became of the wish that pages be fetched for a session's next turn.
struct Prefetched {
  std::string error;       // not empty: it was refused
  bool known = false;      // the session is
  std::int64_t pages = 0;  // that come as far as there is room for them
};

// What telling of copies did: of how many, and how many tickets were unknown or told before.
struct Acknowledged {
  std::int64_t taken = 0;
  std::int64_t unknown = 0;
};

struct Stats {
  std::int64_t running = 0;
  std::int64_t waiting = 0;
  std::int64_t draining = 0;
  std::int64_t pages_total = 0;
  std::int64_t pages_free = 0;
  std::int64_t pages_cached = 0;  // in the prefix index, held by nobody
  std::int64_t pages_kept = 0;    // of these, by the wish of a session
  std::int64_t sessions = 0;      // that are remembered
  std::int64_t prefix_queries = 0;
  std::int64_t prefix_hits = 0;
  std::int64_t prefix_looks = 0;  // walks down the prefix index
  std::int64_t prefix_nodes = 0;  // of it: roots, what is cached, what is remembered above
  std::int64_t preemptions = 0;
  std::int64_t evictions = 0;
  std::int64_t steps = 0;
  std::int64_t prefix_hits_host = 0;  // of prefix_hits, tokens that came back from the host
  std::int64_t host_pages_total = 0;
  std::int64_t host_pages_free = 0;
  std::int64_t host_pages_cached = 0;
  std::int64_t stores = 0;      // copies to the host that were acknowledged as good
  std::int64_t loads = 0;       // copies back
  std::int64_t prefetches = 0;  // of them, for turns that had not come
  std::int64_t copies_failed = 0;
  std::int64_t copies_unknown = 0;  // tickets that no copy waited for
  std::int64_t drafts = 0;          // tokens, of rows that were not dropped
  std::int64_t drafts_accepted = 0;
};

class Scheduler final {
 public:
  static constexpr std::int32_t kPriorityMax = 100;  // and the least is its negative
  static constexpr std::int64_t kArrivals = 16;      // that one step of priority is worth

  // Throws nothing: a configuration is checked by `invalid` first.
  explicit Scheduler(const SchedulerConfig& config);

  // Empty, or which field is wrong and why.
  static std::string invalid(const SchedulerConfig& config);

  // Requests come in by arrival, but one of lower `priority` goes ahead of so many that came before
  // it as it is lower, times kArrivals. So nobody waits for more than a bounded number of later
  // ones.
  Refusal submit(std::int64_t number, std::span<const Token> prompt, std::int32_t max_tokens,
                 std::string_view salt, const Turn& turn = {}, std::int32_t priority = 0);
  PlanPointer plan();
  // Guesses what a decoding request says next, for the first step that is planned when all of its
  // tokens are known; until then it is not planned ahead. How many are kept; 0 if it does not
  // decode. Forgotten when it says something.
  std::int32_t propose(std::int64_t number, std::span<const Token> draft);
  // The same for each of these, with what its own text suggests (ngrams.hpp): drafts in all.
  std::int64_t guess(std::span<const std::int64_t> numbers);
  // A stop flag a row, and a run of as many tokens as the row has drafts, and one: the drafts that
  // are right, the token that was sampled after them, and -1 from there on.
  // `duration_us`: from the completion before this one, or from when there was work again; 0 if
  // nobody knows. What the latency budget leaves for prefill is learned from it. `awaits_tool`, if
  // it is not empty, flags the rows whose session will come back with the result of a tool.
  CommittedPointer commit(std::int64_t step, std::span<const Token> token_ids,
                          std::span<const std::uint8_t> stop, std::int64_t duration_us = 0,
                          std::span<const std::uint8_t> awaits_tool = {});
  // What became of copies, in any order; a ticket that no copy waits for does nothing. Of the two
  // equally long arrays the second says which copies are good.
  Acknowledged acknowledge(std::span<const std::int64_t> tickets,
                           std::span<const std::uint8_t> good);
  bool abort(std::int64_t number);
  // Time passes: microseconds since whenever. It is a hint, and never runs backwards.
  void advance(Microseconds now_us) { control_.advance(now_us); }
  // No next turn will come. False if the session is unknown.
  bool end_session(std::string_view name);
  // The next turn is near: what the last one left on the host alone comes back, as long as nobody
  // waits and into pages that nobody is promised, and is kept for so long like what a turn asks to
  // be kept. Until the turn comes, the session ends, or the time is over.
  Prefetched prefetch(std::string_view session, Microseconds keep_us);
  // Evicts every cached page that no request holds, leaves first. What a request holds stays.
  Cleared clear_cache();

  Stats stats() const noexcept;
  bool idle() const noexcept;  // nothing to plan and nothing in flight
  const std::vector<Token>* tokens(std::int64_t number) const;
  std::vector<std::string> check() const;
  std::int64_t transitions(lifecycle::Action action, lifecycle::State from,
                           lifecycle::State to) const noexcept {
    return control_.transitions(action, from, to);
  }
  void set_recording(bool on) noexcept { control_.set_recording(on); }
  std::vector<Event> take_events() noexcept { return control_.take_events(); }
  std::vector<TraceStep> take_trace() noexcept { return control_.take_trace(); }
  void set_recording_kv(bool on) noexcept { control_.set_recording_kv(on); }
  std::vector<KvEvent> take_kv_events() noexcept { return control_.take_kv_events(); }
  std::map<PageId, Prefix> prefixes() const { return control_.prefixes(); }
  std::map<HostPage, Prefix> host_prefixes() const { return control_.host_prefixes(); }

 private:
  static constexpr std::size_t kFetchesMax = 8;  // requests that pages are loaded for at once
  static constexpr Microseconds kKeepMax = 30LL * 24 * 3600 * 1'000'000;  // 30 days
  // Of the head of the queue, when it last did not fit: how many of its leading pages were held.
  // Pages that nobody holds are as good as free ones, so what it lacks depends on these alone.
  struct HeldBack {
    std::int64_t arrival = -1;
    std::uint64_t gained = 0;  // of the index: with gaps, what was touched on its path
    PrefixIndex::Held held;
  };
  // Of a queued request whose prefix went on on the host: those pages. They are asked for once
  // ahead of its turn, and once when it is its turn. What does not come is computed.
  struct Fetch {
    std::int64_t arrival = -1;
    std::int32_t before = 0;  // pages that were on the device
    bool as_head = false;     // at its turn
    std::vector<HostPage> from;
    std::vector<std::int64_t> tickets;
  };
  // Of an idle session, until a time: the path that its next turn will want, from above.
  struct Prefetch {
    std::uint64_t session = 0;
    Microseconds until = 0;
    Kind as = kind::kTurn;  // what pages become when the time is over
    PrefixIndex::Trail trail;
    std::vector<PrefixIndex::Place> path;
    std::size_t next = 0;                // of the path, to be loaded
    std::deque<std::int64_t> tickets{};  // of the copies under way
    std::vector<Retention::Name> come{};
    bool done() const noexcept { return next == path.size(); }
  };
  static constexpr std::size_t kPrefetchesMax = 64;
  static ControlConfig constants(const SchedulerConfig& config);
  Allowance allowance() noexcept;
  bool schedule_running(Plan& plan, Allowance& left);
  void admit_waiting(Plan& plan, Allowance& left);
  bool admit(RequestIndex index, Plan& plan);
  std::int64_t spare_pages() const noexcept;
  std::int64_t lacks(RequestIndex index, std::int32_t held) const noexcept;
  bool fits(RequestIndex index);
  bool still_held_back(RequestIndex index, HeldBack& known) const;
  std::uint64_t gained() const noexcept {
    return control_.gaps() ? control_.index().touched() : control_.index().gained();
  }
  void prefill(RequestIndex index, Allowance& left, Plan& plan);
  void decode(RequestIndex index, Plan& plan);
  bool yields(RequestIndex index);
  std::int32_t schedule(RequestIndex index, std::int32_t tokens, Plan& plan);
  void write_row(Plan& plan);
  std::int32_t draftable(RequestIndex index) const noexcept;
  void guess_all(Plan& plan);
  std::int32_t guess(RequestIndex index, std::int32_t drafts, Plan& plan);
  bool page_for_drafts();
  void settle(const Outcome& outcome);
  bool evict_one();
  std::int32_t acquire(RequestIndex index, std::int32_t tokens, Plan& plan);
  bool find_page(RequestIndex for_whom, Plan& plan);
  bool preempt_last(RequestIndex for_whom, Plan& plan);
  Work& work_of(std::int64_t step) noexcept {
    return works_[static_cast<std::size_t>(step) % works_.size()];
  }
  void publish(RequestIndex index);
  void want_stored(PageId page);
  void want_all_stored(RequestIndex index);
  void store(Plan& plan);
  std::optional<HostPage> host_page_for(PageId page);
  bool fetch(RequestIndex index, bool as_head, Plan& plan);
  void fetch_ahead(Plan& plan);
  Fetch* fetch_of(std::int64_t arrival) noexcept;
  bool start_load(HostPage from, Plan& plan);
  std::optional<PageId> page_beside(NodeId above);
  bool fetching(RequestIndex index) noexcept;
  bool prefetching() const noexcept;
  void prefetch_all(Plan& plan);
  bool prefetch_next(Prefetch& each, Plan& plan);
  std::optional<PageId> page_nobody_wants(NodeId above);
  void prefetched(std::int64_t ticket, NodeId node);
  void cancel_prefetch(std::string_view session, bool forget);
  void end_copies();
  bool end_copy(HostPage block, bool good);
  void drop_condemned();
  std::string refuse_results(const Ticket& ticket, std::int64_t step,
                             std::span<const Token> token_ids, std::span<const std::uint8_t> stop,
                             std::span<const std::uint8_t> awaits_tool) const;

  SchedulerConfig config_;
  Control control_;
  Recycler<Plan> plans_;
  Recycler<Committed> commits_;
  HeldBack held_back_;
  CostModel model_;
  Work work_;                      // of the plan being made
  std::vector<Work> works_;        // of the steps in flight, each at its number modulo their most
  std::vector<Outcome> outcomes_;  // of the step being committed
  bool short_ = false;             // in the plan being made, a request found no page
  std::vector<RequestIndex> guessing_;  // that are planned last, with drafts
  std::int32_t drafts_left_ = 0;        // that the plan being made has room for
  std::vector<PageId> to_store_;        // published, or given up, and perhaps not yet on the host
  std::vector<Fetch> fetches_;          // of the first in the queue, at most kFetchesMax
  std::vector<Prefetch> prefetches_;    // at most kPrefetchesMax, the oldest first
  std::vector<HostPage> condemned_;     // that came back wrong, and what hangs from them
  Stats counts_;
};

}  // namespace tokenspeed
