// Tests of the corpus generator: g++ -std=c++17 -O2 data/test_stories.cpp -o test_stories && ./test_stories
//
// The stories are read back by a reader that shares nothing with the writer: it knows English sentences, not the grammar's tables.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#define STORIES_NO_MAIN
#include "stories.cpp"

#include <cmath>
#include <map>
#include <set>

// What a careful reader knows after a text: where each thing is, and where in the text that was last said.
struct Reader {
    std::map<std::string, std::string> place;
    std::map<std::string, size_t> told;
    int questions = 0, moves = 0;
    bool consistent = true;

    // One sentence; a question comes with its answer, if it has one. Returns the thing that is asked for, or nothing.
    std::string read(const std::string& s, size_t end) {
        size_t in = s.find(s[0] == 'W' && s.find('?') != s.npos ? " In the " : " in the ");
        if (s.rfind("Where is the ", 0) == 0) {
            std::string thing = s.substr(13, s.find('?') - 13);
            if (!place.count(thing)) consistent = false;
            if (in == s.npos) return thing;
            questions++;
            if (s.substr(in + 8, s.size() - in - 9) != place[thing]) consistent = false;
            told[thing] = end;
            return thing;
        }
        size_t the = s.find(" the ");
        if (in == s.npos || the >= in) return "";
        std::string thing = s.substr(the + 5, in - the - 5);
        moves += (int)place.count(thing);
        place[thing] = s.substr(in + 8, s.size() - in - 9);
        told[thing] = end;
        return "";
    }
    // Sentences end in a full stop; a question mark at the very end leaves its question open. Returns the thing of that one.
    std::string read_all(const std::string& text) {
        std::string open;
        for (size_t begin = 0; begin < text.size();) {
            size_t end = std::min(text.find('.', begin), text.size() - 1) + 1;
            open = read(text.substr(begin, end - begin), end);
            begin = end + 1;
        }
        return open;
    }
};

static std::vector<std::string> split_stories(const std::string& text) {
    std::vector<std::string> stories;
    each_story(text, [&](std::string_view s) { stories.emplace_back(s); });
    return stories;
}

TEST_CASE("the same seed gives the same bytes, another seed other stories") {
    StoryOptions o;
    std::string text = make_text(o, 100000, Side::TRAIN, 7);
    CHECK(text == make_text(o, 100000, Side::TRAIN, 7));
    CHECK(make_text(o, 50000, Side::TRAIN, 7) == text.substr(0, make_text(o, 50000, Side::TRAIN, 7).size()));  // an endless stream, cut off
    CHECK(text != make_text(o, 100000, Side::TRAIN, 8));
    CHECK(question_lines(make_questions(o, 50, 7)) == question_lines(make_questions(o, 50, 7)));
    CHECK(question_lines(make_questions(o, 50, 7)) != question_lines(make_questions(o, 50, 8)));
}

TEST_CASE("a reader of the texts agrees with every answer in them") {
    std::string text = make_text({}, 1000000, Side::TRAIN, 3);
    CHECK(text.size() < 1000000 + 300);
    CHECK(text.substr(text.size() - end_of_story.size()) == end_of_story);
    int questions = 0, moves = 0;
    for (const std::string& story : split_stories(text)) {
        Reader reader;
        reader.read_all(story);
        CHECK_MESSAGE(reader.consistent, story);
        questions += reader.questions;
        moves += reader.moves;
    }
    CHECK(questions > 5000);
    CHECK(moves > 300);
}

static void check_questions(const StoryOptions& o, int count) {
    int moved = 0;
    std::map<int, int> powers;
    for (const Story& q : make_questions(o, count, 5)) {
        std::string prompt(q.prompt());
        REQUIRE(prompt.back() == '?');
        Reader reader;
        std::string thing = reader.read_all(prompt);
        REQUIRE_MESSAGE(reader.place.count(thing), prompt);
        CHECK_MESSAGE(q.answer == " In the " + reader.place[thing] + ".", prompt);
        CHECK_MESSAGE((int)(prompt.rfind("Where") - reader.told[thing]) == q.distance, prompt);
        CHECK(q.distance >= o.min_distance);
        CHECK(q.distance <= o.max_distance);
        CHECK(1 + prompt.size() + q.answer.size() <= (size_t)std::max(o.max_distance, 155) + 101);
        moved += reader.moves > 0;
        powers[std::ilogb((double)q.distance)]++;
    }
    CHECK(moved > count / 50);
    for (auto [power, n] : powers) CHECK_MESSAGE(std::fabs(n * (double)powers.size() / count - 1) < 0.25, power);
}
TEST_CASE("questions: answers, distances, even spread") { check_questions({}, 4000); }
TEST_CASE("questions: far ones") { check_questions({256, 8191}, 1000); }
TEST_CASE("questions: near ones") { check_questions({16, 63}, 1000); }

TEST_CASE("answers are near uniform: without the story there is nothing to go by") {
    constexpr int n = 28800, places = place_adjectives.size * place_nouns.size;
    std::map<std::string, int> seen;
    for (const Story& q : make_questions({}, n, 11)) seen[q.answer]++;
    CHECK((int)seen.size() == places);
    double chi2 = 0, expected = (double)n / places;
    for (const auto& [answer, times] : seen) chi2 += (times - expected) * (times - expected) / expected;
    double freedom = places - 1;
    CHECK(chi2 < freedom + 5 * std::sqrt(2 * freedom));
    CHECK(guess_rate == doctest::Approx(1.0 / places));
}

TEST_CASE("no validation story or question is in a training text, whatever the seeds") {
    std::set<std::string> train;
    for (uint64_t seed : {1, 2})
        for (std::string& s : split_stories(make_text({}, 2000000, Side::TRAIN, seed))) train.insert(s.substr(0, s.find('?')));
    int common = 0;
    for (const std::string& s : split_stories(make_text({}, 300000, Side::VALIDATION, 2))) common += (int)train.count(s.substr(0, s.find('?')));
    // Beginnings, up to the first question, may coincide, if only in the shortest stories.
    CHECK(common < 20);
    train.clear();
    for (std::string& s : split_stories(make_text({}, 2000000, Side::TRAIN, 1))) train.insert(s);
    for (const std::string& s : split_stories(make_text({}, 300000, Side::VALIDATION, 2))) CHECK(!train.count(s));
}

TEST_CASE("numbers and distances are read strictly") {
    CHECK(parse_whole("n", "12k", 0, 1000000) == 12000);
    CHECK(parse_whole("n", "3M", 0, 3000000) == 3000000);
    for (const char* bad : {"", "k", "-1", "1.5M", "12 ", "0x10", "1kk", "99999999999999999999", "18446744073709551615G"})
        CHECK_THROWS_AS(parse_whole("n", bad, 0, UINT64_MAX), Error);
    CHECK_THROWS_AS(parse_whole("n", "5", 6, 9), Error);
    CHECK(parse_distance("16..155").max_distance == 155);
    for (const char* bad : {"16", "16..", "..16", "16..40", "0..100", "100..16", "16..155..200"}) CHECK_THROWS_AS(parse_distance(bad), Error);
}

TEST_CASE("a directory that is not there is a data error, and nothing is left behind") {
    Settings s;
    s.out = "/nonexistent/directory";
    s.train_bytes = s.val_bytes = 1000;
    s.questions = 5;
    try {
        write_corpus(s);
        FAIL("written");
    } catch (const Error& e) {
        CHECK(e.exit_code == EXIT_DATA);
    }
}
