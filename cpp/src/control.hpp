// What may happen: each action of specs/Lifecycle.tla, and of specs/HostTier.tla and
// specs/Draft.tla which extend it, as one method, over real pages and a real prefix index. Rule: a
// method does exactly its action, or nothing and says so; *when* is the scheduler's business,
// *whether* is answered by the generated lifecycle and the guards here.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
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

#include "host_tier.hpp"
#include "ngrams.hpp"
#include "prefix_index.hpp"
#include "sessions.hpp"
#include "tokenspeed/lifecycle.hpp"
#include "tokenspeed/pages.hpp"

namespace tokenspeed {

// The constants of the spec.
struct ControlConfig {
  std::int32_t page_size = 16;
  std::int32_t pages = 0;
  std::int32_t slots = 64;
  std::int32_t chunk = 512;        // tokens of one request in one step, at most
  std::int32_t in_flight_max = 1;  // steps launched and not completed
  bool prefix_cache = true;        // without it nothing is published, so nothing is found
  std::int32_t kept_max = 0;       // pages that are kept by the wish of a session
  std::int32_t host_pages = 0;     // of the second home of cached pages; 0: there is none
  std::int32_t drafts_max = 0;     // guesses of one request in one step, at most
  std::vector<CacheGroup> groups{CacheGroup{}};  // a page holds the KV of the layers of one
};

// What a request says of the session that it is a turn of.
struct Turn {
  std::string_view session{};  // empty: of none
  Microseconds keep_us = 0;    // keep its pages so long once it has ended
  bool supersedes = false;     // nobody will go on from the turn before
};

constexpr std::int32_t pages_for(std::int32_t tokens, std::int32_t page_size) noexcept {
  return (tokens + page_size - 1) / page_size;
}

// Whose turn comes first. It is fixed when a request is submitted, so that all agree: `Before` in
// the spec.
struct Rank {
  std::int64_t at = 0;        // arrival and patience
  std::int64_t patience = 0;  // later arrivals that may go ahead
  auto operator<=>(const Rank&) const = default;
};

// Where a request's record lies; the next request may be given it once this one has ended.
using RequestIndex = std::uint32_t;

// What is known of a request beside what it holds. What a step needs comes first, in a cache
// line.
struct alignas(64) Record {
  std::vector<Token> tokens;  // prompt and accepted output
  std::int64_t number = -1;
  lifecycle::State state = lifecycle::State::New;
  bool in_plan = false;   // the step being assembled has work for it
  bool lacks = false;     // as `Lacks` says; counted
  bool offered = false;   // there is a draft
  bool guessing = false;  // a row with drafts is planned or launched: none comes behind it
  std::uint32_t incarnation = 0;
  std::int32_t place = 0;      // in the container of its state
  std::int32_t pages = 0;      // in its table, of all groups in turn, holes included
  std::int32_t holds = 0;      // positions that have a page of each group
  std::int32_t told = 0;       // of its pages, the first, that a plan has named
  std::int32_t slid = 0;       // holes: in each group, all in front
  std::int32_t planned = 0;    // positions that a step has been planned for
  std::int32_t done = 0;       // positions whose KV is there
  std::int32_t pins = 0;       // planned and launched steps that touch its pages
  std::int32_t promised = 0;   // pages that it has yet to take for known tokens; summed up
  std::int32_t published = 0;  // leading pages that are in the prefix index, or were, or are holes
  Token last = -1;             // of `tokens`: whose end lies far from here
  std::int64_t arrival = 0;
  Rank rank;
  std::int32_t length_max = 0;  // prompt and output tokens
  // Of its salt, while it holds pages, and of the last published page: of each group.
  std::array<PrefixIndex::Cursor, kGroupsMax> roots{-1};
  std::array<PrefixIndex::Cursor, kGroupsMax> cursors{-1};
  std::array<std::int32_t, kGroupsMax> behind{};  // holes of each group
  std::string salt;
  Session* session = nullptr;
  Microseconds keep_us = 0;
  bool supersedes = false;
  bool revisits = false;     // it came back to a branch of its session
  bool awaits_tool = false;  // what its session does next
  std::vector<Token> draft;  // guesses of what comes after the known tokens; of those in its row,
                             // if there is one with any, the first are these
  std::unique_ptr<Ngrams> ngrams;  // of `tokens`, if it is guessed from them
  std::int32_t known() const noexcept { return static_cast<std::int32_t>(tokens.size()); }
};

// Work for one request in a step: positions from .. from + tokens. It pins the request until the
// step completes.
struct Row {
  RequestIndex index;
  std::int32_t from;
  std::int32_t tokens;
  bool samples;
  std::int32_t drafts = 0;  // of the tokens, the last
};

// A launched step.
struct Ticket {
  std::int64_t step;
  std::vector<Row> rows;
  std::size_t results;  // tokens that it may come to: one a row, and one a draft
};

// The launched steps, oldest first: a ring of as many as may be in flight, whose memory is used
// again.
class Launched final {
 public:
  Launched(std::int32_t in_flight_max, std::int32_t rows_max)
      : tickets_(static_cast<std::size_t>(in_flight_max)) {
    for (Ticket& ticket : tickets_) ticket.rows.reserve(static_cast<std::size_t>(rows_max));
  }
  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  bool full() const noexcept { return size_ == tickets_.size(); }
  const Ticket& operator[](std::size_t at) const noexcept {
    return tickets_[(first_ + at) % tickets_.size()];
  }
  const Ticket& front() const noexcept { return tickets_[first_]; }
  // Takes the rows and leaves an empty vector, whose memory an earlier step had.
  const Ticket& push(std::int64_t step, std::vector<Row>& rows, std::size_t results) noexcept {
    Ticket& ticket = tickets_[(first_ + size_++) % tickets_.size()];
    ticket.step = step;
    ticket.results = results;
    ticket.rows.swap(rows);
    rows.clear();
    return ticket;
  }
  void pop() noexcept {
    first_ = (first_ + 1) % tickets_.size();
    --size_;
  }

 private:
  std::vector<Ticket> tickets_;
  std::size_t first_ = 0;
  std::size_t size_ = 0;
};

// What completing a row did to its request.
struct Outcome {
  RequestIndex index;
  std::int32_t accepted;  // tokens that were taken: a sampled one, and the drafts before it
  bool finished;
  std::int32_t drafts;  // that the row had
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
  std::int64_t value;   // patience of a Submit, tokens of a Schedule, pages of an Admit, token of a
                        // Complete, step
  std::string_view to;  // the request's state after it
};

// What happened to the prefix index. Of a page that comes: what it is found by.
struct KvEvent {
  std::string_view action;      // Publish, Evict, or Clear: no page is left
  PageId page = -1;             // -1: a Clear
  PageId parent = -1;           // the page before it; -1: it is the first
  std::string salt{};           // of a first page
  std::vector<Token> tokens{};  // of this page
};

// What clearing the prefix index did: pages that went, and pages that stay because they are held.
struct Cleared {
  std::int64_t evicted = 0;
  std::int64_t held = 0;
};

// A page of the prefix index, as checks compare it.
struct Prefix {
  std::string salt;
  std::vector<Token> tokens;  // of this page and of all before it
  bool operator==(const Prefix&) const = default;
};

// All of it as values, for comparing with the spec.
struct Snapshot {
  struct Request {
    const Record* record;
    std::vector<PageId> table;
  };
  struct Copy {
    PageId page;
    HostPage block;
    bool out;  // device to host
  };
  struct Page {
    std::string_view kind;  // as the spec's PageKind
    std::int32_t references = 0;
    std::vector<Token> key;  // the tokens of it and of all before it
    std::string_view salt;   // of the root above them
  };
  std::vector<Request> requests;  // alive, oldest first
  std::vector<Page> pages;
  std::vector<Page> host;
  std::vector<Copy> moves;
  std::vector<Row> plan;
  std::vector<std::vector<Row>> inflight;
};

class Control final {
 public:
  explicit Control(const ControlConfig& config);
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  // Empty, or which field is wrong and why.
  static std::string invalid(const ControlConfig& config);

  // --- the actions
  std::optional<RequestIndex> submit(std::int64_t number, std::span<const Token> prompt,
                                     std::int32_t length_max, std::string_view salt,
                                     const Turn& turn = {}, std::int64_t patience = 0);
  bool admit(RequestIndex index);
  bool acquire(RequestIndex index, PageId page);
  bool schedule(RequestIndex index, std::int32_t tokens);
  bool launch();
  // The oldest launched step: a stop flag a row, and a run of as many tokens as the row has drafts,
  // and one. Drafts that are right come first, then the token that was sampled after them, then
  // nothing: -1. What nobody takes is dropped.
  bool complete(std::span<const Token> token_ids, std::span<const std::uint8_t> stop,
                std::vector<Outcome>& out);
  bool publish(RequestIndex index);
  // Gives back the first page of a group that it holds, if that lies behind the window of every
  // token to come and of every step in flight: of specs/Window.tla.
  bool slide(RequestIndex index);
  bool preempt(RequestIndex index);
  bool abort(RequestIndex index);
  bool release(RequestIndex index);
  bool evict(PageId page);
  // Evicts, leaves first, every page that nobody holds: the same as `evict` on each.
  Cleared clear();
  // Of the second home. A copy that ends badly, or after the page above it went, was in vain.
  bool store_start(PageId page, HostPage block);
  bool store_end(HostPage block, bool good);
  bool load_start(HostPage block, PageId page);
  bool load_end(HostPage block, bool good);
  bool host_drop(HostPage block);
  // Of drafts: a page for them, a row with so many, and a page that is not needed after all.
  bool reserve(RequestIndex index, PageId page);
  bool speculate(RequestIndex index, std::int32_t drafts);
  bool trim(RequestIndex index);
  bool acknowledge(std::int64_t ticket, bool good) { return host_.acknowledge(ticket, good); }

  // Guesses what comes after the known tokens of a request; how many are kept. Forgotten when more
  // is known.
  std::int32_t propose(RequestIndex index, std::span<const Token> draft);
  // The same with what followed the last time that its text ended as it does now: O(new tokens).
  std::int32_t guess(RequestIndex index);

  // --- hints: they order what `Evict` takes, and change no action
  void advance(Microseconds now) { index_.retention().advance(now); }
  void awaits_tool(RequestIndex index) noexcept { records_[index].awaits_tool = true; }
  bool end_session(std::string_view name) { return sessions_.forget(name); }
  const Sessions& sessions() const noexcept { return sessions_; }
  Session* session(std::string_view name) { return sessions_.find(name); }
  Retention& retention() noexcept { return index_.retention(); }
  Retention::Name keep(NodeId node, Kind as, Microseconds until) {
    return index_.keep(node, as, until);
  }

  // --- what a scheduler looks at
  const Record& record(RequestIndex index) const noexcept { return records_[index]; }
  std::optional<RequestIndex> find(std::int64_t number) const;
  std::span<const RequestIndex> running() const noexcept { return running_; }  // by rank
  // Waiting and Preempted, by rank.
  using Queue = std::set<std::pair<Rank, RequestIndex>>;
  const Queue& queue() const noexcept { return queued_; }
  std::size_t alive() const noexcept { return by_number_.size(); }
  const std::vector<Row>& planned() const noexcept { return plan_; }
  const Launched& launched() const noexcept { return launched_; }
  const PagePool& pool() const noexcept { return pool_; }
  const PrefixIndex& index() const noexcept { return index_; }
  const HostTier& host() const noexcept { return host_; }
  std::optional<HostPage> oldest_on_host() { return host_.oldest(); }
  std::optional<PageId> next_evictable_but(NodeId spared, bool unwanted = false) {
    return index_.next_evictable_but(spared, unwanted);
  }
  // Host pages that continue what was found on the device.
  void look_further(RequestIndex index, std::vector<HostPage>& out);
  std::int64_t steps() const noexcept { return step_; }
  // Pages behind a window are given back, or there are several groups: a path may have gaps.
  bool gaps() const noexcept { return slides_ || config_.groups.size() > 1; }
  // Pages that running requests have yet to take for tokens that are known: promised at admission.
  // One that is planned ahead of what is known has taken them, and owes nobody any.
  std::int64_t promised() const noexcept { return promised_; }
  // What admitting a request would find cached; looked up once as long as the cache stays as it is.
  const PrefixIndex::Found& cached(RequestIndex index);
  PrefixIndex::Found look(RequestIndex index) const;
  bool deepen(PrefixIndex::Held& held, RequestIndex index) const;
  void watch(RequestIndex index);
  // Pages without which so many tokens cannot be computed, however slowly: of all groups.
  std::int32_t pages_needed(std::int32_t tokens) const noexcept;
  // Pages of so many tokens that are held at once while they are computed: with a window, fewer.
  std::int32_t pages_at_once(std::int32_t tokens) const noexcept;
  // Positions that could be computed now: known tokens, or the one that a launched step samples.
  std::int32_t wanted(RequestIndex index) const noexcept;
  // Drafts of any use to a request, if there were pages.
  std::int32_t guesses(RequestIndex index) const noexcept;
  // Why a run cannot be what this row came to; null if it can.
  const char* wrong_run(const Row& row, std::span<const Token> run) const noexcept;
  std::int32_t slot(RequestIndex index) const noexcept;  // -1: it has none
  // Pages that were named; from now on all are.
  std::int32_t tell_pages(RequestIndex index) noexcept {
    return std::exchange(records_[index].told, records_[index].pages);
  }
  const PageTable* table(RequestIndex index) const noexcept;  // null: it has none

  std::int64_t transitions(lifecycle::Action action, lifecycle::State from,
                           lifecycle::State to) const noexcept;
  void set_recording(bool on) noexcept { recording_ = on; }
  std::vector<Event> take_events() noexcept { return std::exchange(events_, {}); }
  std::vector<TraceStep> take_trace() noexcept { return std::exchange(trace_, {}); }
  void set_recording_kv(bool on) noexcept {
    recording_kv_ = on;
    kv_events_.clear();
  }
  std::vector<KvEvent> take_kv_events() noexcept { return std::exchange(kv_events_, {}); }
  Snapshot snapshot() const;
  std::map<PageId, Prefix> prefixes() const;
  std::map<HostPage, Prefix> host_prefixes() const;  // of what is there, not on its way
  // Recomputes who holds what from scratch; the violations found.
  std::vector<std::string> check() const;

  // --- World: what the generated lifecycle asks
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
  bool Starved() const noexcept;
  bool NoneLacks() const noexcept;
  bool NoneEvictable() const noexcept;
  bool SlotFree() const noexcept;
  bool FirstQueued(RequestId id) const noexcept;
  bool Wants(RequestId id) const noexcept;
  bool Lacks(RequestId id) const noexcept;
  bool Fits(RequestId id) const noexcept;
  bool LastRunning(RequestId id) const noexcept;
  bool Alone(RequestId id) const noexcept;
  bool Pinned(RequestId id) const noexcept;

 private:
  static constexpr std::size_t kSessionsMax = 1 << 14;  // idle ones that are remembered
  using State = lifecycle::State;
  template <State S>
  using Request = lifecycle::Request<S, Control>;
  template <State S>
  struct Shelf {
    std::vector<Request<S>> requests;
  };

  template <State S>
  std::vector<Request<S>>& shelf() noexcept {
    return std::get<Shelf<S>>(shelves_).requests;
  }
  template <State S>
  Request<S>& handle(RequestIndex index) noexcept {
    return shelf<S>()[static_cast<std::size_t>(records_[index].place)];
  }
  template <State S>
  const Request<S>& handle(RequestIndex index) const noexcept {
    return std::get<Shelf<S>>(shelves_).requests[static_cast<std::size_t>(records_[index].place)];
  }
  template <State S>
  Request<S> take(RequestIndex index) noexcept;
  template <State S>
  void put(Request<S>&& request);
  template <class F>
  decltype(auto) with(RequestIndex index, F&& f) {
    return lifecycle::visit(records_[index].state, std::forward<F>(f));
  }

  RequestIndex new_record();
  void retire(RequestIndex index) noexcept;
  void recount(RequestIndex index) noexcept;
  std::int32_t owed(const Record& record) const noexcept;
  std::size_t matchable(const Record& record) const noexcept;
  std::int32_t pages_within(std::int32_t tokens) const noexcept;
  std::int32_t pages_seen(std::int32_t tokens, std::int64_t beyond) const noexcept;
  std::optional<std::size_t> next_to_slide(const Record& record) const noexcept;
  void pass(Record& record);
  std::optional<PrefixIndex::Vacancy> next_vacancy(Record& record);
  void count_pages(Record& record, std::int32_t pages) noexcept;
  std::span<const Token> tokens_of(const Record& record, std::int32_t entry) const noexcept;
  // Of an entry of a table: which page of its group it is. Most have one group: no division.
  std::int32_t page_of(std::int32_t entry) const noexcept {
    return groups() == 1 ? entry : entry / groups();
  }
  // Are all positions of it computed, and their tokens known?
  bool computed(const Record& record, std::int32_t entry) const noexcept {
    return (page_of(entry) + 1) * config_.page_size <= std::min(record.done, record.known());
  }
  std::size_t group_of(std::int32_t entry) const noexcept {
    return static_cast<std::size_t>(entry) % config_.groups.size();
  }
  std::int32_t groups() const noexcept { return static_cast<std::int32_t>(config_.groups.size()); }
  static std::size_t index_of(std::int32_t at) noexcept { return static_cast<std::size_t>(at); }
  PageTable match(RequestIndex index);
  Outcome complete(const Row& row, std::span<const Token> run, bool stop);
  void expect_token(RequestIndex index) const noexcept;
  bool wrong_runs(const Ticket& ticket, std::span<const Token> token_ids) const noexcept;
  std::int32_t accept(Record& record, std::span<const Token> run);
  void roll_back(const Row& row, std::int32_t accepted) noexcept;
  bool may_guess(RequestIndex index) const noexcept;
  TailId drain(PageTable& pages, const Record& record);
  void end_turn(RequestIndex index, TailId tail);
  TailId give_back(Record& record, PageTable&& pages, Slot&& slot);
  void check_host(std::vector<std::string>& wrong) const;
  void note(PageId page, std::int64_t value) noexcept;
  void trace(std::string_view action, PageId page, std::int64_t value, std::string_view to = {});

  ControlConfig config_;
  bool slides_;  // some group has a window
  PagePool pool_;
  PrefixIndex index_;
  Sessions sessions_;
  HostTier host_;
  std::vector<std::int32_t> free_slots_;
  std::vector<Record> records_;
  std::vector<RequestIndex> spare_;
  std::unordered_map<std::int64_t, RequestIndex> by_number_;
  std::tuple<Shelf<State::Waiting>, Shelf<State::Prefilling>, Shelf<State::Decoding>,
             Shelf<State::Preempted>, Shelf<State::Finishing>, Shelf<State::Aborting>>
      shelves_;
  Queue queued_;
  std::vector<RequestIndex> running_;  // Prefilling and Decoding, by rank
  std::vector<Row> plan_;              // the step being assembled
  std::size_t plan_drafts_ = 0;        // in it
  Launched launched_;
  std::int64_t arrivals_ = 0;
  std::int64_t step_ = 0;
  std::int32_t lacking_ = 0;   // requests that lack a page
  std::int64_t promised_ = 0;  // of all requests
  struct {
    std::int64_t arrival = -1;
    std::uint64_t version = 0;
    std::size_t most = 0;
    PrefixIndex::Found found;
  } looked_;  // the last look, and what it depends on
  bool recording_ = false;
  std::vector<Event> events_;
  std::vector<TraceStep> trace_;
  bool recording_kv_ = false;
  std::vector<KvEvent> kv_events_;
  static constexpr std::size_t kStates = lifecycle::kStateNames.size();
  std::array<std::int64_t, lifecycle::kActionNames.size() * kStates * kStates> transitions_{};
};

}  // namespace tokenspeed
