#include "control.hpp"

#include <algorithm>

namespace tokenspeed {

using lifecycle::Action;

// --- configuration, tear-down ------------------------------------------------------------------

std::string Control::invalid(const ControlConfig& config) {
  const std::pair<const char*, std::int32_t> fields[] = {
      {"page_size", config.page_size},
      {"pages", config.pages},
      {"slots", config.slots},
      {"chunk", config.chunk},
      {"in_flight_max", config.in_flight_max},
  };
  for (const auto& [field, value] : fields) {
    if (value < 1) {
      return std::string(field) + ": got " + std::to_string(value) + "; expected at least 1";
    }
  }
  for (const auto& [field, value] :
       {std::pair{"host_pages", config.host_pages}, std::pair{"drafts_max", config.drafts_max}}) {
    if (value < 0) {
      return std::string(field) + ": got " + std::to_string(value) + "; expected at least 0";
    }
  }
  const std::size_t groups = config.groups.size();
  if (groups < 1 || groups > kGroupsMax) {
    return "groups: got " + std::to_string(groups) + "; expected 1 to " +
           std::to_string(kGroupsMax);
  }
  if (std::ranges::any_of(config.groups, [](CacheGroup g) { return g.window == 1; })) {
    return "window: got 1; expected 0, or at least 2: who sees itself alone reads no KV";
  }
  if (config.host_pages > 0 && (groups > 1 || config.groups[0].window > 0)) {
    return "host_pages: got " + std::to_string(config.host_pages) +
           "; expected 0 with a window: no specification has both";
  }
  return {};
}

Control::Control(const ControlConfig& config)
    : config_(config),
      slides_(std::ranges::any_of(config.groups, [](CacheGroup g) { return g.window > 0; })),
      pool_(config.pages),
      index_(config.page_size, config.pages, config.kept_max, config.host_pages, config.groups),
      sessions_(index_.retention(), kSessionsMax),
      host_(index_, pool_, config.host_pages),
      launched_(config.in_flight_max, config.slots) {
  const auto slots = static_cast<std::size_t>(config.slots);
  free_slots_.reserve(slots);
  for (std::int32_t slot = config.slots; slot-- > 0;) free_slots_.push_back(slot);
  running_.reserve(slots);
  plan_.reserve(slots);
  const auto reserve = [slots]<class R>(std::vector<R>& requests) {
    if constexpr (lifecycle::owns_slot(R::kState)) requests.reserve(slots);
  };
  std::apply([&](auto&... shelf) { (reserve(shelf.requests), ...); }, shelves_);
}

Control::~Control() {
  const auto abandon = [this]<class R>(std::vector<R>& requests) {
    for (R& request : requests) {
      if constexpr (lifecycle::owns_pages(R::kState)) drain(request.pages(), Record{});
      request.abandon();
    }
  };
  std::apply([&](auto&... shelf) { (abandon(shelf.requests), ...); }, shelves_);
  host_.drain();
}

// The last page first, so that the index can let leaves go. What is left of it in the cache, if
// anything.
TailId Control::drain(PageTable& pages, const Record& record) {
  const std::uint64_t session = record.session ? record.session->id : 0;
  const TailId tail = index_.open_tail(session, record.revisits);
  while (!pages.empty()) {
    auto entry = pages.pop();
    if (auto* own = std::get_if<ExclusivePage>(&entry)) pool_.give_back(std::move(*own));
    if (auto* shared = std::get_if<SharedPage>(&entry)) index_.release(std::move(*shared), tail);
  }
  return index_.close_tail(tail);
}

TailId Control::give_back(Record& record, PageTable&& pages, Slot&& slot) {
  const TailId tail = drain(pages, record);
  for (std::size_t group = 0; record.roots[0] >= 0 && group < config_.groups.size(); ++group) {
    if (gaps()) index_.go(record.cursors[group]);
    index_.leave(record.roots[group]);
  }
  record.roots[0] = -1;
  free_slots_.push_back(slot.index());
  return tail;
}

// --- containers by state -----------------------------------------------------------------------

template <lifecycle::State S>
Control::Request<S> Control::take(RequestIndex index) noexcept {
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
void Control::put(Request<S>&& request) {
  auto& requests = shelf<S>();
  records_[request.id().index].place = static_cast<std::int32_t>(requests.size());
  requests.push_back(std::move(request));
}

RequestIndex Control::new_record() {
  if (spare_.empty()) {
    records_.emplace_back();
    return static_cast<RequestIndex>(records_.size() - 1);
  }
  const RequestIndex index = spare_.back();
  spare_.pop_back();
  return index;
}

void Control::retire(RequestIndex index) noexcept {
  Record& record = records_[index];
  by_number_.erase(record.number);
  const std::uint32_t incarnation = record.incarnation + 1;
  record = Record{};
  record.incarnation = incarnation;
  spare_.push_back(index);
}

// --- requests ----------------------------------------------------------------------------------

std::optional<RequestIndex> Control::submit(std::int64_t number, std::span<const Token> prompt,
                                            std::int32_t length_max, std::string_view salt,
                                            const Turn& turn, std::int64_t patience) {
  if (prompt.empty() || std::ssize(prompt) >= length_max) return std::nullopt;
  if (by_number_.contains(number)) return std::nullopt;
  std::vector<Token> tokens;  // what may throw comes before anybody knows of the request
  tokens.reserve(static_cast<std::size_t>(length_max));
  tokens.assign(prompt.begin(), prompt.end());
  std::string owner(salt);
  const RequestIndex index = new_record();
  by_number_.emplace(number, index);
  Record& record = records_[index];
  record.number = number;
  record.arrival = arrivals_;
  record.rank = {arrivals_ + patience, patience};
  record.length_max = length_max;
  record.salt = std::move(owner);
  record.tokens = std::move(tokens);
  record.last = record.tokens.back();
  record.draft.reserve(static_cast<std::size_t>(config_.drafts_max));
  auto created = lifecycle::create<Control>(RequestId{index, record.incarnation});
  auto verdict = lifecycle::permit_Submit(*this, created);
  if (!verdict) {
    created.abandon();
    retire(index);
    return std::nullopt;
  }
  put(lifecycle::Submit(*this, std::move(created), std::move(verdict).take()));
  note(-1, patience);
  queued_.emplace(record.rank, index);
  ++arrivals_;
  record.session = sessions_.arrive(turn.session);
  record.keep_us = turn.keep_us;
  record.supersedes = turn.supersedes;
  return index;
}

bool Control::admit(RequestIndex index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Admit, S)) {
      auto verdict = lifecycle::permit_Admit(*this, handle<S>(index));
      if (!verdict) return false;
      Record& record = records_[index];
      PageTable pages = match(index);
      count_pages(record, static_cast<std::int32_t>(pages.size()));
      Slot slot(free_slots_.back());
      free_slots_.pop_back();
      record.published = record.pages;
      record.planned = record.done = record.holds;
      queued_.erase(queued_.begin());
      const auto place = std::ranges::upper_bound(
          running_, record.rank, {}, [this](RequestIndex at) { return records_[at].rank; });
      running_.insert(place, index);
      put(lifecycle::Admit(*this, take<S>(index), std::move(verdict).take(), std::move(slot),
                           std::move(pages)));
      note(-1, record.holds / config_.page_size);
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

void Control::end_turn(RequestIndex index, TailId tail) {
  const Record& record = records_[index];
  sessions_.end(record.session, tail, record.keep_us, record.awaits_tool);
}

bool Control::abort(RequestIndex index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::edge(Action::Abort, S, State::Aborted)) {
      queued_.erase({records_[index].rank, index});
      static_cast<void>(lifecycle::Abort(*this, take<S>(index)));
      end_turn(index, -1);
      retire(index);
      return true;
    } else if constexpr (lifecycle::can(Action::Abort, S)) {
      std::erase(running_, index);
      put(lifecycle::Abort(*this, take<S>(index)));
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

bool Control::release(RequestIndex index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Release, S)) {
      auto verdict = lifecycle::permit_Release(*this, handle<S>(index));
      if (!verdict) return false;
      const Record& record = records_[index];
      if (record.session && config_.host_pages > 0) {
        record.session->trail = index_.trail(record.cursors[0]);
      }
      auto out = lifecycle::Release(*this, take<S>(index), std::move(verdict).take());
      end_turn(index, give_back(records_[index], std::move(out.pages), std::move(out.slot)));
      retire(index);
      return true;
    } else {
      return false;
    }
  });
}

bool Control::preempt(RequestIndex index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Preempt, S)) {
      auto verdict = lifecycle::permit_Preempt(*this, handle<S>(index));
      if (!verdict) return false;
      running_.pop_back();
      auto out = lifecycle::Preempt(*this, take<S>(index), std::move(verdict).take());
      put(std::move(out.request));
      Record& record = records_[index];
      sessions_.wait(record.session, give_back(record, std::move(out.pages), std::move(out.slot)));
      count_pages(record, 0);
      record.planned = record.done = record.published = record.slid = 0;
      record.behind.fill(0);
      record.offered = false;
      queued_.emplace(record.rank, index);
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

// --- steps -------------------------------------------------------------------------------------

bool Control::acquire(RequestIndex index, PageId id) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Acquire, S)) {
      auto verdict = lifecycle::permit_Acquire(*this, handle<S>(index));
      if (!verdict) return false;
      auto page = pool_.take(id);
      if (!page) return false;
      handle<S>(index) =
          lifecycle::Acquire(*this, std::move(handle<S>(index)), std::move(verdict).take());
      note(id, -1);
      handle<S>(index).pages().append(std::move(*page));
      count_pages(records_[index], records_[index].pages + 1);
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

bool Control::schedule(RequestIndex index, std::int32_t tokens) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Schedule, S)) {
      Record& record = records_[index];
      const std::int32_t room = record.holds - record.planned;
      if (tokens < 1 || tokens > std::min({config_.chunk, wanted(index), room})) return false;
      auto verdict = lifecycle::permit_Schedule(*this, handle<S>(index));
      if (!verdict) return false;
      handle<S>(index) =
          lifecycle::Schedule(*this, std::move(handle<S>(index)), std::move(verdict).take());
      note(-1, tokens);
      plan_.push_back({index, record.planned, tokens, record.planned + tokens >= record.known()});
      record.planned += tokens;
      record.in_plan = true;
      ++record.pins;
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

bool Control::launch() {
  if (plan_.empty() || launched_.full()) return false;
  trace("Launch", -1, step_);
  const std::size_t results = plan_.size() + std::exchange(plan_drafts_, 0);
  for (const Row& row : launched_.push(step_++, plan_, results).rows) {
    records_[row.index].in_plan = false;
    recount(row.index);
  }
  return true;
}

bool Control::complete(std::span<const Token> token_ids, std::span<const std::uint8_t> stop,
                       std::vector<Outcome>& out) {
  if (launched_.empty()) return false;
  const Ticket& ticket = launched_.front();
  if (token_ids.size() != ticket.results || stop.size() != ticket.rows.size()) return false;
  if (ticket.results > ticket.rows.size() && wrong_runs(ticket, token_ids)) return false;
  constexpr std::size_t kAhead = 8;  // rows: as long as memory takes
  for (std::size_t at = 0; at < ticket.rows.size(); ++at) {
    if (at + kAhead < ticket.rows.size()) expect_token(ticket.rows[at + kAhead].index);
    const Row& row = ticket.rows[at];
    const auto run = token_ids.first(static_cast<std::size_t>(row.drafts) + 1);
    token_ids = token_ids.subspan(run.size());
    out.push_back(complete(row, run, stop[at] != 0));
  }
  trace("Complete", -1, ticket.step);
  launched_.pop();
  return true;
}

// The place of its next token is asked for, so that nobody waits for it: those of long texts lie
// each in a memory page of its own.
void Control::expect_token(RequestIndex index) const noexcept {
  const std::vector<Token>& tokens = records_[index].tokens;
  __builtin_prefetch(tokens.data() + tokens.size(), 1);
}

Outcome Control::complete(const Row& row, std::span<const Token> run, bool stop) {
  Outcome out{row.index, 0, false, row.drafts};
  Record& record = records_[row.index];
  --record.pins;
  record.done = row.from + row.tokens;
  with(row.index, [&]<State S>() {
    const auto move = [&]<State To>() {
      if constexpr (!lifecycle::edge(Action::Complete, S, To)) {
        return;
      } else if constexpr (To == S) {
        handle<S>(row.index) = lifecycle::Complete<To>(*this, std::move(handle<S>(row.index)));
      } else {
        put(lifecycle::Complete<To>(*this, take<S>(row.index)));
      }
    };
    if constexpr (lifecycle::edge(Action::Complete, S, State::Finishing) && S != State::Finishing) {
      if (!row.samples) return move.template operator()<S>();
      out.accepted = accept(record, run);
      if (!stop && record.known() < record.length_max) {
        return move.template operator()<State::Decoding>();
      }
      out.finished = true;
      std::erase(running_, row.index);
      return move.template operator()<State::Finishing>();
    } else {
      return move.template operator()<S>();  // draining: the result is dropped
    }
  });
  note(-1, out.accepted > 0 ? record.last : -1);
  if (row.drafts > 0) roll_back(row, out.accepted);
  recount(row.index);
  return out;
}

}  // namespace tokenspeed
