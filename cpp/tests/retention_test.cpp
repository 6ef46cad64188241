// What goes first. Rule: with sessions whose habits are plain, the order is what a person would
// say; and under random calls of everything a hint can say, no count is off.
#include "retention.hpp"

#include <cstdio>
#include <cstdlib>
#include <random>

#include "prefix_index.hpp"
#include "sessions.hpp"

namespace {

using namespace tokenspeed;

constexpr Microseconds kSecond = 1'000'000;

#define REQUIRE(condition)                                                 \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

// An index and sessions over it; a page has one token.
class World {
 public:
  explicit World(PageId pages, PageId kept_max = 0, std::size_t idle_max = 64)
      : pool_(pages), index_(1, pages, kept_max, 0), sessions_(index_.retention(), idle_max) {}

  // A turn of a session from its arrival to its end; its tokens are its pages.
  void turn(const char* name, std::vector<Token> tokens, Microseconds keep_us = 0,
            bool awaits_tool = false, bool supersedes = false) {
    Session* session = sessions_.arrive(name);
    const std::uint64_t id = session ? session->id : 0;
    PageTable table;
    const auto found = index_.look("", tokens, tokens.size());
    const auto root = index_.enter("");
    auto cursor = found.pages > 0 ? found.at[0] : root;
    const bool revisits = index_.hold(found, table, id);
    if (session) sessions_.took(*session, supersedes);
    for (auto at = static_cast<std::size_t>(found.pages); at < tokens.size(); ++at) {
      if (pool_.free() == 0) REQUIRE(evict() >= 0);
      const auto content = std::span<const Token>(tokens).subspan(at, 1);
      auto page = pool_.take(*pool_.next());
      table.append(
          index_.publish(cursor, content, *index_.vacancy(cursor, content), std::move(*page)));
    }
    const TailId tail = index_.open_tail(id, revisits);
    while (!table.empty()) index_.release(std::get<SharedPage>(table.pop()), tail);
    sessions_.end(session, index_.close_tail(tail), keep_us, awaits_tool);
    index_.leave(root);
    REQUIRE(index_.tails_right());
  }
  // The last token of the page that goes; -1: none can.
  Token evict() {
    const auto page = index_.next_evictable();
    if (!page) return -1;
    Token last = -1;
    for (const auto& [node, at] : index_.pages()) {
      if (at == *page) last = index_.key(node).back();
    }
    REQUIRE(index_.evict(*page, pool_));
    REQUIRE(index_.tails_right());
    return last;
  }
  void at(Microseconds now) { index_.retention().advance(now); }
  Sessions& sessions() { return sessions_; }
  Retention& retention() { return index_.retention(); }

 private:
  PagePool pool_;
  PrefixIndex index_;
  Sessions sessions_;
};

void strangers_go_in_order_of_use() {
  World world(8);
  world.turn("", {1});
  world.turn("", {2});
  world.turn("", {3});
  world.turn("", {1});
  REQUIRE(world.evict() == 2 && world.evict() == 3 && world.evict() == 1 && world.evict() == -1);
}

void who_never_comes_back_goes_before_who_does() {
  World world(12);  // so few that strangers' pages are evicted, and the model hears of it
  Microseconds now = 0;
  for (Token turn = 0; turn < 200; ++turn) {
    world.at(now += 2 * kSecond);
    world.turn("often", {1});
    world.turn("", {5000 + turn});
  }
  world.turn("often", {1});
  world.at(now += kSecond);
  world.turn("", {2});
  Token last = world.evict();
  for (Token next = last; next >= 0; next = world.evict()) last = next;
  REQUIRE(last == 1);
}

void a_wish_is_kept_within_the_bound_and_lapses() {
  World world(8, 2);
  world.at(kSecond);
  world.turn("a", {1, 2}, 10 * kSecond);
  world.turn("b", {3}, 10 * kSecond);  // the bound is reached
  world.turn("", {4});
  REQUIRE(world.retention().kept() == 2);
  REQUIRE(world.evict() == 4 && world.evict() == 3 && world.evict() == 2);
  REQUIRE(world.retention().kept() == 1);
  world.turn("", {5});
  world.at(11 * kSecond);
  REQUIRE(world.retention().kept() == 0);
  world.turn("", {6});
}

void who_ends_or_is_superseded_goes_first() {
  World world(8, 8);
  world.turn("a", {1, 2}, kSecond);
  world.turn("", {3});
  REQUIRE(!world.sessions().forget("nobody"));
  world.at(1);
  world.turn("b", {4, 5});
  world.turn("b", {4, 6}, 0, false, true);
  REQUIRE(world.evict() == 5);
  REQUIRE(world.sessions().forget("a"));
  REQUIRE(world.sessions().size() == 1);
  REQUIRE(world.evict() == 2 && world.evict() == 1 && world.evict() == 3);
}

void the_longest_idle_session_is_forgotten_beyond_the_bound() {
  World world(8, 0, 2);
  world.turn("a", {1});
  world.turn("b", {2});
  world.turn("a", {1});
  world.turn("c", {3});
  REQUIRE(world.sessions().size() == 2);
  REQUIRE(!world.sessions().forget("b") && world.sessions().forget("a"));
  REQUIRE(world.evict() == 1);
}

void any_calls_leave_every_count_right(unsigned seed) {
  std::mt19937 random(seed);
  const auto upto = [&](unsigned n) { return static_cast<Token>(random() % n); };
  World world(6, upto(5));
  const char* names[] = {"", "a", "b", "c"};
  Microseconds now = 0;
  for (int turn = 0; turn < 200; ++turn) {
    std::vector<Token> tokens(static_cast<std::size_t>(1 + upto(4)));
    for (Token& token : tokens) token = upto(2);
    const char* name = names[upto(4)];
    world.at(now += upto(3) * kSecond);
    if (upto(8) == 0) {
      world.sessions().forget(name);
    } else {
      world.turn(name, tokens, upto(3) * kSecond, upto(2) == 0, upto(4) == 0);
    }
  }
  while (world.evict() >= 0) {
  }
  REQUIRE(world.retention().kept() == 0);
}

// A class that comes back after about eight seconds is worth most then, and little long after.
void the_model_learns_when_things_come_back() {
  ReturnModel model(2);
  for (int i = 0; i < 1000; ++i) {
    model.left(0);
    if (i % 10 < 9) model.returned(0, (6 + i % 4) * kSecond);
    model.left(1);
    model.lost(1, 60 * kSecond);
  }
  REQUIRE(model.density(0, 6 * kSecond) > 2 * model.density(0, 0));
  REQUIRE(model.density(0, 60 * kSecond) < model.density(0, 0) / 10);
  REQUIRE(model.density(1, 6 * kSecond) < model.density(0, 0) / 10);
}

}  // namespace

int main() {
  strangers_go_in_order_of_use();
  who_never_comes_back_goes_before_who_does();
  a_wish_is_kept_within_the_bound_and_lapses();
  who_ends_or_is_superseded_goes_first();
  the_longest_idle_session_is_forgotten_beyond_the_bound();
  the_model_learns_when_things_come_back();
  for (unsigned seed = 0; seed < 300; ++seed) any_calls_leave_every_count_right(seed);
  std::printf("who is missed least goes first\n");
}
