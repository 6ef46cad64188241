// Registration only: the scheduler as Python sees it. Rule: no decision is made here. Calls release
// the GIL and take the scheduler's lock, so that any thread may look while one drives.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "arrays.hpp"
#include "locked.hpp"
#include "scheduler.hpp"

namespace py = pybind11;
using namespace tokenspeed;

namespace {

class QueueFull : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The scheduler and its lock, for which nobody waits with the GIL.
class Native {
 public:
  explicit Native(const SchedulerConfig& config) : scheduler_(checked(config)) {}

  template <class F>
  auto run(F&& f) {
    py::gil_scoped_release free;
    return scheduler_.run(std::forward<F>(f));
  }

 private:
  static const SchedulerConfig& checked(const SchedulerConfig& config) {
    const std::string wrong = Scheduler::invalid(config);
    if (!wrong.empty()) throw py::value_error(wrong);
    return config;
  }
  Locked<Scheduler> scheduler_;
};

// A setting, of which what has no place in 32 bits is refused by name.
std::int32_t number(const Setting& setting, const py::handle& given) {
  return arrays::integer<std::int32_t>(
      std::string(setting.name), given,
      [&](const std::string& wide) { throw py::value_error(setting.refuse(wide)); });
}

SchedulerConfig configuration(const py::dict& given) {
  SchedulerConfig config;
  for (const auto& [key, value] : given) {
    const auto name = key.cast<std::string>();
    const auto setting = std::ranges::find(kSettings, name, &Setting::name);
    if (setting != std::end(kSettings)) {
      config.*setting->value = number(*setting, value);
    } else if (name == "prefix_cache") {
      config.prefix_cache = value.cast<bool>();
    } else {
      throw py::type_error("the scheduler has no setting " + name);
    }
  }
  return config;
}

template <arrays::Name name>
using Whole32 = arrays::Whole<name, std::int32_t>;
template <arrays::Name name>
using Whole64 = arrays::Whole<name, std::int64_t>;
template <arrays::Name name>
using Tokens = arrays::Input<name, Token>;
template <arrays::Name name>
using Numbers = arrays::Input<name, std::int64_t>;
template <arrays::Name name>
using Flags = arrays::Input<name, bool>;
using Number = Whole64<"number">;
using KeepUs = Whole64<"keep_us">;

void submit(Native& self, Number number, const Tokens<"prompt">& prompt,
            Whole32<"max_tokens"> max_tokens, const std::string& salt, const std::string& session,
            KeepUs keep_us, bool supersedes, Whole32<"priority"> priority) {
  const auto tokens = prompt.span();
  const Turn turn{session, keep_us, supersedes};
  const Refusal refusal = self.run([&](Scheduler& scheduler) {
    return scheduler.submit(number, tokens, max_tokens, salt, turn, priority);
  });
  if (refusal.queue_full) throw QueueFull(refusal.message);
  if (refusal.refused()) throw py::value_error(refusal.field + ": " + refusal.message);
}

py::object commit(Native& self, Whole64<"step"> step, const Tokens<"token_ids">& token_ids,
                  const Flags<"stop">& stop, Whole64<"duration_us"> duration_us,
                  const std::optional<Flags<"awaits_tool">>& awaits_tool) {
  const auto tokens = token_ids.span();
  const auto flags = stop.span<std::uint8_t>();
  std::span<const std::uint8_t> awaits;
  if (awaits_tool) awaits = awaits_tool->span<std::uint8_t>();
  CommittedPointer out = self.run([&](Scheduler& scheduler) {
    return scheduler.commit(step, tokens, flags, duration_us, awaits);
  });
  if (!out->error.empty()) throw py::value_error(out->error);
  return arrays::Boxed<Committed>::box(std::move(out));
}

py::tuple acknowledge(Native& self, const Numbers<"tickets">& tickets, const Flags<"good">& good) {
  const auto copies = tickets.span();
  const auto flags = good.span<std::uint8_t>();
  if (copies.size() != flags.size()) {
    throw py::value_error("acknowledge: got " + std::to_string(copies.size()) + " tickets and " +
                          std::to_string(flags.size()) + " flags; expected one a ticket");
  }
  const Acknowledged out =
      self.run([&](Scheduler& scheduler) { return scheduler.acknowledge(copies, flags); });
  return py::make_tuple(out.taken, out.unknown);
}

py::dict transitions(Native& self) {
  using lifecycle::Action;
  using lifecycle::State;
  py::dict out;
  for (std::size_t a = 0; a < lifecycle::kActionNames.size(); ++a) {
    for (std::size_t from = 0; from < lifecycle::kStateNames.size(); ++from) {
      for (std::size_t to = 0; to < lifecycle::kStateNames.size(); ++to) {
        const auto action = static_cast<Action>(a);
        const auto source = static_cast<State>(from);
        const auto target = static_cast<State>(to);
        if (!lifecycle::edge(action, source, target)) continue;
        const auto count = self.run([&](const Scheduler& scheduler) {
          return scheduler.transitions(action, source, target);
        });
        out[py::make_tuple(py::str(std::string(name(action))), py::str(std::string(name(source))),
                           py::str(std::string(name(target))))] = count;
      }
    }
  }
  return out;
}

py::list trace(const std::vector<TraceStep>& taken) {
  py::list out;
  for (const TraceStep& step : taken) {
    out.append(py::make_tuple(step.action, step.number, step.page, step.value, step.to));
  }
  return out;
}

// A request by its number, as everything outside knows it; an action on none is refused.
template <auto action, class... Arguments>
bool act(Control& self, std::int64_t number, Arguments... arguments) {
  const auto index = self.find(number);
  return index && (self.*action)(*index, arguments...);
}

py::list rows(const Control& self, const std::vector<Row>& rows) {
  py::list out;
  for (const Row& row : rows) {
    out.append(py::make_tuple(self.record(row.index).number, row.from, row.tokens, row.samples,
                              row.drafts));
  }
  return out;
}

py::dict snapshot(const Control& self) {
  const Snapshot found = self.snapshot();
  py::dict requests;
  for (const auto& [record, table] : found.requests) {
    requests[py::int_(record->number)] =
        py::make_tuple(name(record->state), table, record->known(), record->planned, record->done);
  }
  py::list pages;
  for (const auto& [kind, references, key, salt] : found.pages) {
    pages.append(py::make_tuple(kind, references, salt, py::tuple(py::cast(key))));
  }
  py::list inflight;
  for (const auto& step : found.inflight) inflight.append(rows(self, step));
  py::list host;
  for (const auto& [kind, references, key, salt] : found.host) {
    host.append(py::make_tuple(kind, salt, py::tuple(py::cast(key))));
  }
  py::list moves;
  for (const auto& [page, block, out] : found.moves) {
    moves.append(py::make_tuple(page, block, out));
  }
  py::dict out;
  out["requests"] = requests;
  out["pages"] = pages;
  out["plan"] = rows(self, found.plan);
  out["inflight"] = inflight;
  out["host"] = host;
  out["moves"] = moves;
  return out;
}

py::list finished(const Committed& self) {
  py::list out;
  for (const auto& [number, reason] : self.finished) {
    out.append(py::make_tuple(number, reason == FinishReason::Stop ? "stop" : "length"));
  }
  return out;
}

py::list released(const Committed& self) {
  return py::cast(self.released);
}

void bind_step(py::module_& m) {
  using P = arrays::Boxed<Plan>;
  static PyGetSetDef plan[] = {
      P::number<&Plan::step>("step"),
      P::array<&Plan::numbers, std::int64_t>("numbers"),
      P::array<&Plan::incarnations, std::int32_t>("incarnations"),
      P::array<&Plan::slots, std::int32_t>("slots"),
      P::array<&Plan::query_start, std::int32_t>("query_start"),
      P::array<&Plan::token_ids, std::int32_t>("token_ids"),
      P::array<&Plan::context_lens, std::int32_t>("context_lens"),
      P::array<&Plan::sampled, bool>("sampled"),
      P::array<&Plan::drafts, std::int32_t>("drafts"),
      P::array<&Plan::page_delta, std::int32_t, 3>("page_delta"),
      P::array<&Plan::joined, std::int64_t, 2>("joined"),
      P::array<&Plan::cached, std::int32_t>("cached"),
      P::array<&Plan::preempted, std::int64_t>("preempted"),
      P::array<&Plan::stores, std::int64_t, 3>("stores"),
      P::array<&Plan::loads, std::int64_t, 3>("loads"),
      {},
  };
  P::bind(m, "tokenspeed._core.Plan", "Plan", plan);
  using C = arrays::Boxed<Committed>;
  static PyGetSetDef committed[] = {
      C::array<&Committed::accepted, bool>("accepted"),
      C::array<&Committed::taken, std::int32_t>("taken"),
      C::object<&finished>("finished"),
      C::object<&released>("released"),
      {},
  };
  C::bind(m, "tokenspeed._core.Committed", "Committed", committed);
}

void bind_control(py::module_& m) {
  py::class_<Control>(m, "Control")
      .def(py::init([](std::int32_t page_size, std::int32_t pages, std::int32_t slots,
                       std::int32_t chunk, std::int32_t in_flight_max, std::int32_t host_pages,
                       std::int32_t drafts_max, std::int32_t window) {
             ControlConfig config{page_size, pages, slots, chunk, in_flight_max};
             config.host_pages = host_pages;
             config.drafts_max = drafts_max;
             config.groups = {{window}};
             const std::string wrong = Control::invalid(config);
             if (!wrong.empty()) throw py::value_error(wrong);
             auto control = std::make_unique<Control>(config);
             control->set_recording(true);
             return control;
           }),
           py::kw_only(), py::arg("page_size"), py::arg("pages"), py::arg("slots"),
           py::arg("chunk"), py::arg("in_flight_max"), py::arg("host_pages") = 0,
           py::arg("drafts_max") = 0, py::arg("window") = 0)
      .def(
          "submit",
          [](Control& self, std::int64_t number, const std::vector<Token>& prompt,
             std::int32_t length_max, std::string_view salt, std::int64_t patience) {
            return self.submit(number, prompt, length_max, salt, {}, patience).has_value();
          },
          py::arg("number"), py::arg("prompt"), py::arg("length_max"), py::arg("salt"),
          py::arg("patience"))
      .def("admit", &act<&Control::admit>, py::arg("number"))
      .def("acquire", &act<&Control::acquire, PageId>, py::arg("number"), py::arg("page"))
      .def("schedule", &act<&Control::schedule, std::int32_t>, py::arg("number"), py::arg("tokens"))
      .def("publish", &act<&Control::publish>, py::arg("number"))
      .def("slide", &act<&Control::slide>, py::arg("number"))
      .def(
          "propose",
          [](Control& self, std::int64_t number, const std::vector<Token>& draft) {
            const auto index = self.find(number);
            return index ? self.propose(*index, draft) : 0;
          },
          py::arg("number"), py::arg("draft"))
      .def("reserve", &act<&Control::reserve, PageId>, py::arg("number"), py::arg("page"))
      .def("speculate", &act<&Control::speculate, std::int32_t>, py::arg("number"),
           py::arg("drafts"))
      .def("trim", &act<&Control::trim>, py::arg("number"))
      .def("preempt", &act<&Control::preempt>, py::arg("number"))
      .def("abort", &act<&Control::abort>, py::arg("number"))
      .def("release", &act<&Control::release>, py::arg("number"))
      .def("launch", &Control::launch)
      .def(
          "complete",
          [](Control& self, const std::vector<Token>& token_ids,
             const std::vector<std::uint8_t>& stop) {
            std::vector<Outcome> out;
            return self.complete(token_ids, stop, out);
          },
          py::arg("token_ids"), py::arg("stop"))
      .def("evict", &Control::evict, py::arg("page"))
      .def("store_start", &Control::store_start, py::arg("page"), py::arg("block"))
      .def("store_end", &Control::store_end, py::arg("block"), py::arg("good"))
      .def("load_start", &Control::load_start, py::arg("block"), py::arg("page"))
      .def("load_end", &Control::load_end, py::arg("block"), py::arg("good"))
      .def("host_drop", &Control::host_drop, py::arg("block"))
      .def("snapshot", &snapshot)
      .def("trace", [](Control& self) { return trace(self.take_trace()); })
      .def("check", &Control::check);
}

py::list events(Native& self) {
  const auto taken = self.run([](Scheduler& scheduler) { return scheduler.take_events(); });
  py::list out;
  for (const Event& event : taken) {
    out.append(py::make_tuple(std::string(name(event.action)), event.number, event.incarnation,
                              std::string(name(event.from)), std::string(name(event.to))));
  }
  return out;
}

py::list kv_events(Native& self) {
  const auto taken = self.run([](Scheduler& scheduler) { return scheduler.take_kv_events(); });
  py::list out;
  for (const auto& [action, page, parent, salt, tokens] : taken) {
    out.append(py::make_tuple(action, page, parent, salt, py::tuple(py::cast(tokens))));
  }
  return out;
}

py::dict prefixes(Native& self) {
  const auto found = self.run([](const Scheduler& scheduler) { return scheduler.prefixes(); });
  py::dict out;
  for (const auto& [page, prefix] : found) {
    out[py::int_(page)] = py::make_tuple(prefix.salt, py::tuple(py::cast(prefix.tokens)));
  }
  return out;
}

py::dict host_prefixes(Native& self) {
  const auto found = self.run([](const Scheduler& scheduler) { return scheduler.host_prefixes(); });
  py::dict out;
  for (const auto& [page, prefix] : found) {
    out[py::int_(page)] = py::make_tuple(prefix.salt, py::tuple(py::cast(prefix.tokens)));
  }
  return out;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The control plane: a scheduler on the lifecycle that is generated from the spec.";
  m.attr("SPEC_HASH") = std::string(lifecycle::kSpecHash);
  py::register_exception<QueueFull>(m, "QueueFull");

  bind_step(m);

  // Of this module alone: such a type is found with one look instead of two.
  py::class_<Stats>(m, "Stats", py::module_local())
      .def_readonly("running", &Stats::running)
      .def_readonly("waiting", &Stats::waiting)
      .def_readonly("draining", &Stats::draining)
      .def_readonly("pages_total", &Stats::pages_total)
      .def_readonly("pages_free", &Stats::pages_free)
      .def_readonly("pages_cached", &Stats::pages_cached)
      .def_readonly("pages_kept", &Stats::pages_kept)
      .def_readonly("sessions", &Stats::sessions)
      .def_readonly("prefix_queries", &Stats::prefix_queries)
      .def_readonly("prefix_hits", &Stats::prefix_hits)
      .def_readonly("prefix_looks", &Stats::prefix_looks)
      .def_readonly("prefix_nodes", &Stats::prefix_nodes)
      .def_readonly("preemptions", &Stats::preemptions)
      .def_readonly("evictions", &Stats::evictions)
      .def_readonly("steps", &Stats::steps)
      .def_readonly("prefix_hits_host", &Stats::prefix_hits_host)
      .def_readonly("host_pages_total", &Stats::host_pages_total)
      .def_readonly("host_pages_free", &Stats::host_pages_free)
      .def_readonly("host_pages_cached", &Stats::host_pages_cached)
      .def_readonly("stores", &Stats::stores)
      .def_readonly("loads", &Stats::loads)
      .def_readonly("prefetches", &Stats::prefetches)
      .def_readonly("copies_failed", &Stats::copies_failed)
      .def_readonly("copies_unknown", &Stats::copies_unknown)
      .def_readonly("drafts", &Stats::drafts)
      .def_readonly("drafts_accepted", &Stats::drafts_accepted);

  py::class_<Native>(m, "Scheduler", py::module_local())
      .def(py::init([](const py::kwargs& settings) {
        return std::make_unique<Native>(configuration(settings));
      }))
      .def("submit", &submit, py::arg("number"), py::arg("prompt"), py::arg("max_tokens"),
           py::arg("salt") = "", py::arg("session") = "", py::arg("keep_us") = 0,
           py::arg("supersedes") = false, py::arg("priority") = 0)
      .def("plan",
           [](Native& self) {
             return arrays::Boxed<Plan>::box(self.run([](Scheduler& s) { return s.plan(); }));
           })
      .def("commit", &commit, py::arg("step"), py::arg("token_ids"), py::arg("stop"),
           py::arg("duration_us") = 0, py::arg("awaits_tool") = py::none())
      .def(
          "propose",
          [](Native& self, Number number, const Tokens<"draft">& draft) {
            const auto tokens = draft.span();
            // -1 ends a run of tokens, so it must not be one.
            if (std::ranges::any_of(tokens, [](Token t) { return t < 0; })) {
              throw py::value_error("draft: got a token out of bounds; expected 0 to 2147483647");
            }
            return self.run([&](Scheduler& s) { return s.propose(number, tokens); });
          },
          py::arg("number"), py::arg("draft"))
      .def(
          "guess",
          [](Native& self, const Numbers<"numbers">& numbers) {
            const auto span = numbers.span();
            return self.run([&](Scheduler& s) { return s.guess(span); });
          },
          py::arg("numbers"))
      .def(
          "advance",
          [](Native& self, Whole64<"now_us"> now_us) {
            self.run([&](Scheduler& s) { s.advance(now_us); });
          },
          py::arg("now_us"))
      .def(
          "end_session",
          [](Native& self, const std::string& session) {
            return self.run([&](Scheduler& s) { return s.end_session(session); });
          },
          py::arg("session"))
      .def(
          "prefetch",
          [](Native& self, const std::string& session, KeepUs keep_us) {
            const Prefetched out =
                self.run([&](Scheduler& s) { return s.prefetch(session, keep_us); });
            if (!out.error.empty()) throw py::value_error(out.error);
            return out.known ? std::optional(out.pages) : std::nullopt;
          },
          py::arg("session"), py::arg("keep_us"))
      .def("acknowledge", &acknowledge, py::arg("tickets"), py::arg("good"))
      .def(
          "abort",
          [](Native& self, Number number) {
            return self.run([&](Scheduler& s) { return s.abort(number); });
          },
          py::arg("number"))
      .def("clear_cache",
           [](Native& self) {
             const Cleared out = self.run([](Scheduler& s) { return s.clear_cache(); });
             return std::make_pair(out.evicted, out.held);
           })
      .def(
          "tokens",
          [](Native& self, Number number) {
            return self.run([&](const Scheduler& s) {
              const auto* tokens = s.tokens(number);
              return tokens ? std::optional(*tokens) : std::nullopt;
            });
          },
          py::arg("number"))
      .def("stats",
           [](Native& self) { return self.run([](const Scheduler& s) { return s.stats(); }); })
      .def("idle",
           [](Native& self) { return self.run([](const Scheduler& s) { return s.idle(); }); })
      .def("check",
           [](Native& self) { return self.run([](const Scheduler& s) { return s.check(); }); })
      .def(
          "record",
          [](Native& self, bool on) { self.run([&](Scheduler& s) { s.set_recording(on); }); },
          py::arg("on"))
      .def(
          "record_kv",
          [](Native& self, bool on) { self.run([&](Scheduler& s) { s.set_recording_kv(on); }); },
          py::arg("on"))
      .def("host_prefixes", &host_prefixes)
      .def("kv_events", &kv_events)
      .def("prefixes", &prefixes)
      .def("transitions", &transitions)
      .def("events", &events)
      .def("trace", [](Native& self) {
        return trace(self.run([](Scheduler& scheduler) { return scheduler.take_trace(); }));
      });

  bind_control(m);
}
