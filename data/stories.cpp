// stories: the default corpus. An endless, seeded stream of short English stories in which people put things into places, wander off, and
// are asked where the things are:
//
//   Ida hid the rusty key in the old jar. Leo sneezed. Tess left the odd hat in the red well. Where is the rusty key? In the old jar.
//
// Nothing but the story tells the answer, and the story says it `distance` bytes before it asks, so the share of exact answers by distance
// shows how far a model remembers. Written are DIR/train.txt, DIR/val.txt (every story followed by a line <|endoftext|>) and
// DIR/val.questions.jsonl, one question a line: {"prompt", "answer", "distance", "guess"}.
//
// What makes the corpus learnable within minutes by a model of bytes, found by experiment (data/README.md has the figures):
//   - a question repeats the words of the fact: "the rusty key in the old jar", "the rusty key? In the old jar";
//   - questions are many, and asked again: that teaches to copy, without which nothing is looked up;
//   - a part of the stories asks almost at once: near facts are learnt before far ones;
//   - few things a story, and few words for things and places.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "../gpt2/error.h"
#include "../gpt2/files.h"

// ----------------------------------------------------------------------------
// Chance and words

// SplitMix64 (Steele, Lea, Flood 2014): small, fast, and the same everywhere, as the standard library's distributions are not.
struct Random {
    uint64_t state;

    Random(uint64_t seed, uint64_t stream) : state(seed ^ stream * 0xd1342543de82ef95) { state = next(); }
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int below(int n) { return (int)((next() >> 32) * (uint64_t)n >> 32); }
    bool percent(int p) { return below(100) < p; }
};

using Word = std::string_view;
template <int N>
struct Words {
    Word word[N];
    static constexpr int size = N;
    Word pick(Random& random) const { return word[random.below(N)]; }
};
template <class... W>
constexpr Words<(int)sizeof...(W)> words(W... w) {
    return {{Word(w)...}};
}

// The words of a fact differ in their first letters, the earliest sign of which one is meant.
constexpr auto people = words("Ann", "Bob", "Cleo", "Dora", "Emil", "Finn", "Greta", "Hugo", "Ida", "Jack", "Kira", "Leo", "Mina", "Nils", "Olga", "Pip",
                              "Quinn", "Rosa", "Sam", "Tess", "Ugo", "Vera", "Will", "Xena", "Yara", "Zoe");
constexpr auto hiding = words("put", "hid", "left", "laid", "stowed", "tucked", "forgot", "dropped");
constexpr auto thing_adjectives = words("silver", "rusty", "wooden", "tiny", "golden", "broken", "heavy", "odd");
constexpr auto thing_nouns = words("key", "spoon", "lamp", "drum", "bell", "coin", "mug", "hat");
constexpr auto place_adjectives = words("blue", "red", "old", "tall", "empty", "dark", "green", "pink");
constexpr auto place_nouns = words("box", "jar", "cellar", "drawer", "attic", "well", "oven", "tower");

constexpr auto doings =
    words("laughed", "yawned", "sneezed", "sighed", "sang", "danced", "fell asleep", "said nothing", "took a nap", "told a joke", "lost a shoe", "went home");
constexpr auto animals = words("goose", "cat", "goat", "frog", "snail", "horse", "owl", "pig", "hedgehog", "duck");
constexpr auto seeming = words("looked", "seemed", "felt", "grew");
constexpr auto moods = words("happy", "proud", "sleepy", "hungry", "bored", "wise", "shy", "offended", "brave", "puzzled");
constexpr auto foods = words("soup", "cake", "cheese", "toast", "jam", "pudding", "porridge", "pie", "a turnip", "an onion");
constexpr auto times = words("at noon", "at dawn", "after tea", "all day", "until dark", "for an hour", "in silence", "on Monday", "as usual", "once more");

// The chance of naming the right place without having read the story.
constexpr double guess_rate = 1.0 / (place_adjectives.size * place_nouns.size);

// ----------------------------------------------------------------------------
// A story

struct StoryOptions {
    int min_distance = 16, max_distance = 155;  // bytes between the end of the fact and the question about it
};
// The longest fact, question and answer. With the default distances a story and its end-of-text token fit 256 tokens.
constexpr int bytes_beside_distance = 100, bytes_of_question = 60, bytes_of_quiz = 200;

struct Thing {
    int adjective = -1, noun = -1, place_adjective = -1, place_noun = -1;  // indices of words
    size_t told = 0;                                                       // end of the sentence that last said where it is
};

struct Story {
    std::string text;
    // The main question, with a distance within bounds; others may follow it.
    size_t prompt_size = 0;  // the text up to and including its question mark
    std::string answer;
    int distance = 0;
    int places = 0;           // that the prompt names
    bool last_place = false;  // the answer is the one it names last
    std::string_view prompt() const { return {text.data(), prompt_size}; }
};

struct StoryTeller {
    Story& story;
    Random& random;
    int max_things;
    std::vector<Thing> things;
    Word cast[3];
    int target = -1;      // the thing of the main question: from its fact on it stays where it is
    bool quiet = false;   // nothing but fillers between the fact and the main question
    int just_asked = -1;  // by the last sentence: to ask again at once would be silly

    std::string& text() { return story.text; }

    void begin_sentence() {
        if (!text().empty()) text() += ' ';
        just_asked = -1;
    }
    void say(std::initializer_list<Word> parts) {
        for (Word part : parts) text() += part;
    }
    Word someone() { return cast[random.below(3)]; }

    void choose_cast() {
        int first = random.below(people.size), second = random.below(people.size - 1), third = random.below(people.size - 2);
        second += second >= first;
        third += third >= std::min(first, second);
        third += third >= std::max(first, second);
        cast[0] = people.word[first], cast[1] = people.word[second], cast[2] = people.word[third];
    }

    // Things of one story share no word, nor do the places they are in: either word tells which is meant. Rejection keeps the choice
    // uniform.
    bool choose_name(Thing& thing) {
        for (int tries = 0; tries < 64; tries++) {
            thing.adjective = random.below(thing_adjectives.size), thing.noun = random.below(thing_nouns.size);
            bool fresh = true;
            for (const Thing& other : things) fresh = fresh && other.adjective != thing.adjective && other.noun != thing.noun;
            if (fresh) return true;
        }
        return false;
    }
    bool choose_place(Thing& thing) {
        for (int tries = 0; tries < 64; tries++) {
            int adjective = random.below(place_adjectives.size), noun = random.below(place_nouns.size);
            bool fresh = adjective != thing.place_adjective && noun != thing.place_noun;
            for (const Thing& other : things) fresh = fresh && other.place_adjective != adjective && other.place_noun != noun;
            if (!fresh) continue;
            thing.place_adjective = adjective, thing.place_noun = noun;
            return true;
        }
        return false;
    }

    void say_place(const Thing& thing) { say({place_adjectives.word[thing.place_adjective], " ", place_nouns.word[thing.place_noun], "."}); }

    void say_fact(int i, Word opening) {
        Thing& thing = things[i];
        begin_sentence();
        say({opening, someone(), " ", hiding.pick(random), " the ", thing_adjectives.word[thing.adjective], " ", thing_nouns.word[thing.noun], " in the "});
        say_place(thing);
        thing.told = text().size();
        story.places++;
    }
    bool introduce() {
        Thing thing;
        if ((int)things.size() >= max_things || !choose_name(thing) || !choose_place(thing)) return false;
        things.push_back(thing);
        say_fact((int)things.size() - 1, "");
        return true;
    }
    bool move(int i) {
        if (i == target || !choose_place(things[i])) return false;
        say_fact(i, random.percent(50) ? "Then " : "");
        return true;
    }
    bool ask(int i) {
        if (i == just_asked) return false;
        Thing& thing = things[i];
        begin_sentence();
        say({"Where is the ", thing_adjectives.word[thing.adjective], " ", thing_nouns.word[thing.noun], "? In the "});
        say_place(thing);
        thing.told = text().size();
        just_asked = i;
        return true;
    }

    void wander() {
        begin_sentence();
        int kind = random.below(10);
        if (kind < 4)
            say({someone(), " ", doings.pick(random)});
        else if (kind < 5)
            say({"It rained ", times.pick(random)});
        else if (kind < 7)
            say({"The ", animals.pick(random), " ", seeming.pick(random), " ", moods.pick(random)});
        else if (kind < 9)
            say({someone(), " ate ", foods.pick(random), " ", times.pick(random)});
        else
            say({someone(), " told the ", animals.pick(random), " about ", foods.pick(random)});
        text() += '.';
    }
    // Something other than the target: a question about another thing, a new thing, a move, or nothing in particular.
    void digress() {
        int kind = random.below(100), i = random.below((int)things.size());
        bool said = false;
        if (kind < 40) said = i != target && ask(i);
        if (kind < 65 && !said) said = introduce() || (kind >= 55 && move(i));
        if (!said) wander();
    }

    int distance() const { return (int)(story.text.size() - things[target].told) + 1; }  // if the question came next; 1 is the space before it

    // Digresses until the question is at least `wanted` bytes from the fact. False if it missed low..high.
    bool fill(int low, int wanted, int high) {
        for (int tries = 0; distance() < wanted && tries < 8;) {
            if (!quiet && high - distance() > 56) {  // more than any sentence
                digress();
                continue;
            }
            size_t before = text().size();
            int asked = just_asked;
            wander();
            if (distance() <= high) continue;
            text().resize(before);
            just_asked = asked;
            tries++;
        }
        return distance() >= low && distance() <= high;
    }

    void ask_target() {
        Thing& thing = things[target];
        story.distance = distance();
        story.last_place = true;
        for (const Thing& other : things) story.last_place = story.last_place && other.told <= thing.told;
        ask(target);
        size_t mark = text().rfind('?');
        story.prompt_size = mark + 1;
        story.answer.assign(text(), mark + 1, std::string::npos);
    }
    // A quiz to end with, for the training's sake. To ask again is what teaches to copy, which comes first; to ask for another thing, to look up.
    void ask_more(size_t limit) {
        target = -1;
        int rounds = things.size() == 1 ? 1 + random.below(2) : 2 + random.below(4);
        for (int round = 0; round < rounds && text().size() + 2 * bytes_of_question < limit; round++) {
            int kind = random.below(100), n = (int)things.size();
            if (kind < 25)
                wander();
            else if (kind < 40 && n > 1 && !introduce())
                move(random.below(n));
            just_asked = -1;
            ask(random.below((int)things.size()));
        }
    }
};

// A range of distances, drawn uniformly from the powers of two that MIN..MAX touches. One that is hardly begun at the end joins the one before.
struct DistanceRange {
    int low, high;
};
inline DistanceRange pick_range(const StoryOptions& options, Random& random) {
    DistanceRange ranges[32];
    int n = 0;
    for (int low = options.min_distance; low <= options.max_distance;) {
        int64_t power = 16;
        while (power <= low) power *= 2;
        int high = (int)std::min<int64_t>(power - 1, options.max_distance);
        if (n && high - low < low / 8)
            ranges[n - 1].high = high;
        else
            ranges[n++] = {low, high};
        low = high + 1;
    }
    return ranges[random.below(n)];
}

// Tells one story; `near` ones, of which there are many in the texts, ask almost at once. False if it came out too long: try again.
inline bool tell_story(const StoryOptions& options, bool near, Random& random, Story& story) {
    story.text.clear();
    story.places = 0;
    DistanceRange range = near ? DistanceRange{1, 40} : pick_range(options, random);
    int wanted = range.low + random.below((near ? 32 : range.high + 1) - range.low);
    StoryTeller teller{story, random, std::min(3 + wanted / 256, 8), {}, {}};
    teller.things.reserve(8);
    teller.choose_cast();
    teller.quiet = random.percent(20);
    int limit = std::max(options.max_distance, 155) + bytes_beside_distance;

    // Before the target's fact comes another one, if there is room; or the target itself stood elsewhere before.
    bool another = random.percent(50) && wanted + 150 < limit && teller.introduce();
    if (another && random.percent(20)) {
        if (!teller.move(0)) return false;
        teller.target = 0;
    } else {
        if (!teller.introduce()) return false;
        teller.target = (int)teller.things.size() - 1;
    }
    if (!teller.fill(range.low, wanted, range.high)) return false;
    teller.ask_target();
    if (story.prompt_size + story.answer.size() > (size_t)limit) return false;
    teller.ask_more(limit + bytes_of_quiz);
    return true;
}

// ----------------------------------------------------------------------------
// Training and validation share no story: the hash of a story up to its main question decides which side it belongs to, whatever the seed.

inline uint64_t hash_bytes(std::string_view s) {
    uint64_t h = s.size();
    auto mix = [&](uint64_t block) {
        h = (h ^ block) * 0x9e3779b97f4a7c15;
        h ^= h >> 32;
    };
    size_t i = 0;
    for (; i + 8 <= s.size(); i += 8) mix(load<uint64_t>(s.data() + i));
    for (; i < s.size(); i++) mix((uint8_t)s[i]);
    return h;
}

enum class Side { TRAIN, VALIDATION };
inline Side side_of(const Story& story) { return hash_bytes(story.prompt()) % 8 == 0 ? Side::VALIDATION : Side::TRAIN; }

constexpr std::string_view end_of_story = "\n<|endoftext|>\n";
constexpr int near_percent = 40;  // of the texts' stories; the questions of val.questions.jsonl are of the others, evenly spread

inline void next_story(const StoryOptions& options, int near, Side side, Random& random, Story& story) {
    while (!tell_story(options, random.percent(near), random, story) || side_of(story) != side) {
    }
}

// Whole stories, at least `bytes` of them.
inline std::string make_text(const StoryOptions& options, uint64_t bytes, Side side, uint64_t seed) {
    Random random(seed, side == Side::TRAIN ? 0 : 1);
    Story story;
    std::string text;
    text.reserve(bytes + 4096);
    while (text.size() < bytes) {
        next_story(options, near_percent, side, random, story);
        text += story.text;
        text += end_of_story;
    }
    return text;
}

inline std::vector<Story> make_questions(const StoryOptions& options, int64_t count, uint64_t seed) {
    Random random(seed, 2);
    std::vector<Story> questions((size_t)count);
    for (Story& story : questions) next_story(options, 0, Side::VALIDATION, random, story);
    return questions;
}

// The words hold nothing that JSON would have to escape.
inline std::string question_lines(const std::vector<Story>& questions) {
    std::string lines;
    for (const Story& q : questions)
        lines += "{\"prompt\": \"" + std::string(q.prompt()) + "\", \"answer\": \"" + q.answer + "\", " +
                 format("\"distance\": %d, \"guess\": %.6f}\n", q.distance, guess_rate);
    return lines;
}

// ----------------------------------------------------------------------------
// What training and validation have in common: pieces of one kind, their hashes, and the share of validation's that training has too.

template <class Visit>
void each_story(std::string_view text, Visit visit) {
    for (size_t begin = 0, end; (end = text.find(end_of_story, begin)) != std::string_view::npos; begin = end + end_of_story.size())
        visit(text.substr(begin, end - begin));
}
// A question and its answer count as one sentence: an answer alone tells nothing.
template <class Visit>
void each_sentence(std::string_view text, Visit visit) {
    each_story(text, [&](std::string_view story) {
        for (size_t begin = 0, end; begin < story.size(); begin = end + 2) {
            end = std::min(story.find('.', begin), story.size() - 1);
            visit(story.substr(begin, end + 1 - begin));
        }
    });
}
inline bool tells_fact(std::string_view sentence) { return sentence[0] != 'W' && sentence.find(" in the ") != sentence.npos; }

template <class Each>
double share_in_common(const std::string& train, const std::string& val, Each each) {
    std::vector<uint64_t> asked;
    std::unordered_set<uint64_t> open;
    each(val, [&](uint64_t hash) { asked.push_back(hash); });
    open.insert(asked.begin(), asked.end());
    each(train, [&](uint64_t hash) { open.erase(hash); });
    int64_t common = 0;
    for (uint64_t hash : asked) common += !open.count(hash);
    return asked.empty() ? 0 : (double)common / (double)asked.size();
}

// Runs of 50 bytes: one in 64, chosen by their content and so the same on both sides.
template <class Visit>
void each_run(std::string_view text, Visit visit) {
    constexpr size_t length = 50;
    constexpr uint64_t base = 0x9e3779b97f4a7c15;
    uint64_t hash = 0, leaving = 1;
    for (size_t i = 0; i < length; i++) leaving *= base;
    for (size_t i = 0; i < text.size(); i++) {
        hash = hash * base + (uint8_t)text[i] + 1;
        if (i >= length) hash -= leaving * ((uint8_t)text[i - length] + 1);
        if (i + 1 >= length && (hash * base) >> 58 == 0) visit(hash);
    }
}

inline void print_overlap(const std::string& train, const std::string& val) {
    double stories =
        share_in_common(train, val, [](std::string_view text, auto visit) { each_story(text, [&](std::string_view s) { visit(hash_bytes(s)); }); });
    double facts = share_in_common(train, val, [](std::string_view text, auto visit) {
        each_sentence(text, [&](std::string_view s) {
            if (tells_fact(s)) visit(hash_bytes(s));
        });
    });
    double sentences =
        share_in_common(train, val, [](std::string_view text, auto visit) { each_sentence(text, [&](std::string_view s) { visit(hash_bytes(s)); }); });
    double runs = share_in_common(train, val, [](std::string_view text, auto visit) { each_run(text, visit); });
    printf(
        "of validation, also in training: %.1f%% of the stories, %.1f%% of the sentences that tell a fact, %.1f%% of all sentences, %.1f%% "
        "of runs of 50 bytes\n",
        100 * stories, 100 * facts, 100 * sentences, 100 * runs);
}

// How far readers would come who have read, but not remembered what is where.
inline void print_baselines(const std::vector<Story>& questions) {
    double any = 0, last = 0;
    for (const Story& q : questions) {
        any += 1.0 / q.places;
        last += q.last_place;
    }
    double n = (double)questions.size();
    printf("right without memory: %.1f%% by guessing, %.1f%% by naming any place of the story, %.1f%% by naming its last one\n", 100 * guess_rate,
           100 * any / n, 100 * last / n);
}

// ----------------------------------------------------------------------------
// The program

struct Settings {
    std::string out;
    uint64_t train_bytes = 8000000, val_bytes = 500000, questions = 2000, seed = 1;
    StoryOptions story;
};

const char* help_text =
    "Writes the default corpus: short stories about where things are, and questions about them.\n"
    "Usage: stories --out DIR [OPTIONS]\n\n"
    "  --out DIR            where train.txt, val.txt and val.questions.jsonl go; made if its parent exists\n"
    "  --train-bytes N      bytes of training text, rounded up to a whole story; N may end in k, M or G (default: 8M)\n"
    "  --val-bytes N        bytes of validation text (default: 500k)\n"
    "  --questions N        questions in val.questions.jsonl (default: 2000)\n"
    "  --distance MIN..MAX  bytes from a fact to the question about it, evenly spread over powers of two (default: 16..155);\n"
    "                       a story takes up to MAX + 100 tokens\n"
    "  --seed N             another seed, other stories (default: 1)\n"
    "  --help               this text\n";

// A whole number from low to high; k, M and G multiply by 1000, 1000^2, 1000^3.
uint64_t parse_whole(const char* option, const std::string& text, uint64_t low, uint64_t high) {
    std::string digits = text;
    uint64_t unit = 1, value = 0;
    size_t suffix = digits.empty() ? std::string::npos : std::string("kMG").find(digits.back());
    for (size_t i = 0; suffix != std::string::npos && i <= suffix; i++) unit *= 1000;
    if (unit > 1) digits.pop_back();
    bool valid = !digits.empty() && digits.find_first_not_of("0123456789") == std::string::npos;
    for (char c : digits) valid = valid && checked_mul(value, 10, value) && checked_add(value, (uint64_t)(c - '0'), value);
    valid = valid && checked_mul(value, unit, value);
    if (!valid || value < low || value > high)
        usage_error("%s is '%s': give a whole number from %llu to %llu", option, printable(text).c_str(), (unsigned long long)low, (unsigned long long)high);
    return value;
}

StoryOptions parse_distance(const std::string& text) {
    size_t dots = text.find("..");
    if (dots == std::string::npos) usage_error("--distance is '%s': give MIN..MAX, for example 16..155", printable(text).c_str());
    StoryOptions o;
    o.min_distance = (int)parse_whole("the MIN of --distance", text.substr(0, dots), 1, 1000000);
    o.max_distance = (int)parse_whole("the MAX of --distance", text.substr(dots + 2), 1, 1000000);
    if (o.max_distance < o.min_distance + 32)  // less could leave no room for a sentence to end in
        usage_error("--distance is '%s': make MAX at least MIN + 32", printable(text).c_str());
    return o;
}

void parse_option(const std::string& name, const std::string& value, Settings& s) {
    constexpr uint64_t most = (uint64_t)1 << 40;
    if (name == "--out")
        s.out = value;
    else if (name == "--train-bytes")
        s.train_bytes = parse_whole("--train-bytes", value, 1, most);
    else if (name == "--val-bytes")
        s.val_bytes = parse_whole("--val-bytes", value, 1, most);
    else if (name == "--questions")
        s.questions = parse_whole("--questions", value, 1, 100000000);
    else if (name == "--seed")
        s.seed = parse_whole("--seed", value, 0, UINT64_MAX);
    else if (name == "--distance")
        s.story = parse_distance(value);
    else
        usage_error("unknown option '%s': --help lists what there is", printable(name).c_str());
}

// False if only help was asked for, which has then been printed.
bool parse_command_line(int argc, char** argv, Settings& s) {
    for (int i = 1; i < argc; i++) {
        std::string name = argv[i], value;
        size_t equals = name.find('=');
        if (name == "--help") {
            fputs(help_text, stdout);
            return false;
        }
        if (name.rfind("--", 0) != 0) usage_error("unknown argument '%s': --help lists what there is", printable(name).c_str());
        if (equals != std::string::npos) {
            value = name.substr(equals + 1);
            name.resize(equals);
        } else {
            if (i + 1 == argc) usage_error("%s has no value, or is unknown: --help lists what there is", printable(name).c_str());
            value = argv[++i];
        }
        parse_option(name, value, s);
    }
    if (s.out.empty()) usage_error("no --out: name the directory to write to");
    return true;
}

// All three are complete on the disk before the first gets its name.
void write_corpus(const Settings& s) {
    std::string train = make_text(s.story, s.train_bytes, Side::TRAIN, s.seed), val = make_text(s.story, s.val_bytes, Side::VALIDATION, s.seed);
    std::vector<Story> questions = make_questions(s.story, (int64_t)s.questions, s.seed);
    std::string lines = question_lines(questions);
    if (mkdir(s.out.c_str(), 0777) != 0 && errno != EEXIST) file_error("create", s.out, errno);
    AtomicFile train_file(s.out + "/train.txt"), val_file(s.out + "/val.txt"), questions_file(s.out + "/val.questions.jsonl");
    train_file.write(train.data(), train.size());
    val_file.write(val.data(), val.size());
    questions_file.write(lines.data(), lines.size());
    train_file.commit();
    val_file.commit();
    questions_file.commit();
    printf("%s: %zu bytes to train on, %zu to validate on, %zu questions\n", s.out.c_str(), train.size(), val.size(), questions.size());
    print_overlap(train, val);
    print_baselines(questions);
}

#ifndef STORIES_NO_MAIN  // data/test_stories.cpp has its own
int main(int argc, char** argv) {
    try {
        Settings settings;
        if (parse_command_line(argc, argv, settings)) write_corpus(settings);
        return 0;
    } catch (const Error& e) {
        fprintf(stderr, "stories: %s\n", e.what());
        return e.exit_code;
    } catch (const std::bad_alloc&) {
        fprintf(stderr, "stories: not enough memory for this corpus: lower --train-bytes\n");
        return EXIT_DATA;
    }
}
#endif
