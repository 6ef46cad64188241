// When things happen: continuous batching over the generated lifecycle. Rule: single-threaded and
// deterministic; no clock, no randomness; the same calls give the same plans. *Whether* something
// may happen is the lifecycle's answer: every move goes through one of its functions.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "prefix_index.hpp"
#include "tokenspeed/lifecycle.hpp"
#include "tokenspeed/pages.hpp"

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
  std::vector<std::int32_t> page_delta;  // [changes, 3]: slot, index, page
  std::vector<std::int64_t> joined;      // [joined, 2]: slot, number
  std::vector<std::int32_t> cached;      // [joined]: prompt tokens found in the prefix cache
  std::vector<std::int64_t> preempted;
};

enum class FinishReason : std::uint8_t { Stop, Length };

// What a completed step changed.
struct Committed {
  std::vector<std::uint8_t> accepted;  // by row: the sampled token was taken
  std::vector<std::pair<std::int64_t, FinishReason>> finished;
  std::vector<std::int64_t> released;  // their pages are back
  std::string error;                   // not empty: the batch was refused whole
};

struct Stats {
  std::int64_t running = 0;
  std::int64_t waiting = 0;
  std::int64_t draining = 0;
  std::int64_t pages_total = 0;
  std::int64_t pages_free = 0;
  std::int64_t pages_cached = 0;  // in the prefix index, held by nobody
  std::int64_t prefix_queries = 0;
  std::int64_t prefix_hits = 0;
  std::int64_t preemptions = 0;
  std::int64_t evictions = 0;
  std::int64_t steps = 0;
};

// A move of a request, as the generated transitions report it.
struct Event {
  lifecycle::Action action;
  std::int64_t number;
  std::uint32_t incarnation;
  lifecycle::State from;
  lifecycle::State to;
};

// A step of the specification, with what it was about; -1 and empty where it has none.
struct TraceStep {
  std::string_view action;
  std::int64_t number;
  std::int32_t page;
  std::int64_t value;   // tokens of a Schedule, pages of an Admit, token of a Complete, step
  std::string_view to;  // the request's state after it
};

class Scheduler final {
 public:
  // Throws nothing: a configuration is checked by `invalid` first.
  explicit Scheduler(const SchedulerConfig& config);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Empty, or which field is wrong and why.
  static std::string invalid(const SchedulerConfig& config);

  Refusal submit(std::int64_t number, std::span<const Token> prompt, std::int32_t max_tokens,
                 std::string_view salt);
  std::unique_ptr<Plan> plan();
  Committed commit(std::int64_t step, std::span<const std::int32_t> token_ids,
                   std::span<const std::uint8_t> stop);
  bool abort(std::int64_t number);

  Stats stats() const noexcept;
  bool idle() const noexcept;  // nothing to plan and nothing in flight
  const std::vector<Token>* tokens(std::int64_t number) const;
  std::int64_t transitions(lifecycle::Action action, lifecycle::State from,
                           lifecycle::State to) const noexcept;
  void record(bool on) noexcept { recording_ = on; }
  std::vector<Event> take_events() noexcept { return std::exchange(events_, {}); }
  std::vector<TraceStep> take_trace() noexcept { return std::exchange(trace_, {}); }
  // Recomputes who holds what from scratch; the violations found.
  std::vector<std::string> check() const;

  // --- World: what the generated lifecycle asks
  // ---------------------------------------------------
  class Slot {
   public:
    explicit Slot(std::int32_t index) noexcept : index_(index) {}
    Slot(Slot&&) noexcept = default;
    Slot& operator=(Slot&&) noexcept = default;
    std::int32_t index() const noexcept { return index_; }

   private:
    std::int32_t index_;
  };
  using Pages = PageTable;

  void moved(lifecycle::Action action, RequestId id, lifecycle::State from,
             lifecycle::State to) noexcept;
  bool Starved() const noexcept { return short_ && pool_.free() == 0; }
  bool NoneLacks() const noexcept { return !short_; }
  bool NoneEvictable() const noexcept { return index_.none_evictable(); }
  bool SlotFree() const noexcept { return !free_slots_.empty(); }
  bool FirstQueued(RequestId id) const noexcept;
  bool Wants(RequestId id) const noexcept;
  bool Lacks(RequestId id) const noexcept;
  bool Fits(RequestId id) const noexcept;
  bool Youngest(RequestId id) const noexcept;
  bool Alone(RequestId id) const noexcept;
  bool Pinned(RequestId id) const noexcept;

 private:
  using State = lifecycle::State;
  template <State S>
  using Request = lifecycle::Request<S, Scheduler>;

  // What is known of a request beside what it holds.
  struct Record {
    std::int64_t number = -1;
    std::int64_t arrival = 0;
    std::uint32_t incarnation = 0;
    State state = State::New;
    std::int32_t place = 0;       // in the container of its state
    std::int32_t length_max = 0;  // prompt and output tokens
    std::int32_t pages = 0;       // in its table
    std::int32_t planned = 0;     // positions that a step has been planned for
    std::int32_t computed = 0;    // positions whose KV is there
    std::int32_t published = 0;   // leading pages that have been offered to the prefix index
    std::int32_t pins = 0;        // planned and launched steps that touch its pages
    std::int64_t step = -1;       // the last step that it was planned into
    PrefixIndex::Cursor cursor;
    std::string salt;
    std::vector<Token> tokens;  // prompt and accepted output
    std::int32_t known() const noexcept { return static_cast<std::int32_t>(tokens.size()); }
  };
  // A row of a launched step. It pins its request until the step completes.
  struct Row {
    std::uint32_t index;
    std::int32_t tokens;
    bool samples;
  };
  struct Ticket {
    std::int64_t step;
    std::vector<Row> rows;
  };
  template <State S>
  struct Shelf {
    std::vector<Request<S>> requests;
  };

  template <State S>
  std::vector<Request<S>>& shelf() noexcept {
    return std::get<Shelf<S>>(shelves_).requests;
  }
  template <State S>
  Request<S>& handle(std::uint32_t index) noexcept {
    return shelf<S>()[static_cast<std::size_t>(records_[index].place)];
  }
  template <State S>
  Request<S> take(std::uint32_t index) noexcept;
  template <State S>
  void put(Request<S>&& request);
  template <class F>
  decltype(auto) with(std::uint32_t index, F&& f);

  std::uint32_t new_record();
  void retire(std::uint32_t index) noexcept;
  void queue(std::uint32_t index);

  std::int32_t wanted(const Record& record) const noexcept;
  bool decodes(const Record& record) const noexcept;
  bool schedule(std::uint32_t index, std::int32_t tokens, Plan& plan, Ticket& ticket);
  bool schedule_running(Plan& plan, Ticket& ticket, std::int32_t& budget);
  void admit_waiting(Plan& plan, Ticket& ticket, std::int32_t& budget);
  bool admit(std::uint32_t index, Plan& plan);
  std::int32_t acquire(std::uint32_t index, std::int32_t tokens, Plan& plan);
  std::optional<ExclusivePage> find_page(std::uint32_t index, Plan& plan);
  bool preempt_youngest(std::uint32_t for_whom, Plan& plan);
  std::int64_t promised() const noexcept;

  std::string refuse_results(const Ticket& ticket, std::int64_t step,
                             std::span<const std::int32_t> token_ids,
                             std::span<const std::uint8_t> stop) const;
  void complete(const Row& row, std::int32_t token, bool stop, Committed& out);
  void publish(std::uint32_t index);
  bool release(std::uint32_t index);
  void empty(PageTable& pages);
  void give_back(PageTable&& pages, Slot&& slot);
  void note(PageId page, std::int64_t value) noexcept;
  void trace(std::string_view action, PageId page, std::int64_t value);

  SchedulerConfig config_;
  PagePool pool_;
  PrefixIndex index_;
  std::vector<std::int32_t> free_slots_;
  std::vector<Record> records_;
  std::vector<std::uint32_t> spare_;
  std::unordered_map<std::int64_t, std::uint32_t> by_number_;
  std::tuple<Shelf<State::Waiting>, Shelf<State::Prefilling>, Shelf<State::Decoding>,
             Shelf<State::Preempted>, Shelf<State::Finishing>, Shelf<State::Aborting>>
      shelves_;
  std::set<std::pair<std::int64_t, std::uint32_t>> queued_;  // by arrival
  std::vector<std::uint32_t> running_;                       // Prefilling and Decoding, by arrival
  std::deque<Ticket> launched_;
  std::int64_t arrivals_ = 0;
  std::int64_t step_ = 0;
  bool short_ = false;  // in the plan being made, a request lacked a page
  bool recording_ = false;
  Stats counts_;
  std::vector<Event> events_;
  std::vector<TraceStep> trace_;
  static constexpr std::size_t kStates = lifecycle::kStateNames.size();
  std::array<std::int64_t, lifecycle::kActionNames.size() * kStates * kStates> transitions_{};
};

}  // namespace tokenspeed
