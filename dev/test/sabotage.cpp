// Finds the statements of the backward passes and makes, of a source file, a copy in which each can be broken by setting an environment variable.
// dev/test/sabotage.sh compiles the tests against such copies and runs them once for every mutant.
//
//     sabotage FILE FIRST COPY LIST      writes COPY, and appends to LIST a line a mutant: number, file:line, function, what is done, statement
//
// Where: in every function with `backward` in its name and in those that only such functions call (in this file).
// What:  an assignment (= += -= *= /=)     delete: it is not executed      negate: its right side changes sign
//        a call that stands alone          delete                          turn k: its k-th argument becomes the opposite: true, false, -1, and matmul's 1
//        a declaration `real x = ...`      negate
//        `return` of a real                negate
// Left alone: declarations of anything but real, conditions and loops, assert; -0 for 0.
// A statement that is none of these and was not understood is an error: nothing is left out silently.
// With MUTANT=n in the environment mutant n is broken; without it the copy does what the original does. A sign that cannot be changed because the
// right side is no number (a pointer, a struct) ends the program with status 77: compiled alone, that mutant would be rejected.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

static const char* preamble = R"(#include <cstdlib>
#include <type_traits>
#include <utility>
#ifndef SABOTAGE
#define SABOTAGE
namespace sabotage {
inline const int mutant = getenv("MUTANT") ? atoi(getenv("MUTANT")) : -1;
inline bool kept(int n) { return n != mutant; }
inline bool turned(int n, bool b) { return (n == mutant) != b; }
template <class T, class = void>
struct Negatable : std::false_type {};
template <class T>
struct Negatable<T, std::void_t<decltype(T(-std::declval<T>()))>> : std::true_type {};
template <class T>
T negated(int n, T value) {
    if (n != mutant) return value;
    if constexpr (Negatable<T>::value) return T(-value);
    else _Exit(77);
}
}  // namespace sabotage
#endif
)";

struct Edit {
    size_t at;
    std::string text;
};

struct Function {
    std::string name;
    bool returns_real;
    size_t begin, end;  // the body, between its braces
};

struct Source {
    std::string path, text, clean;  // clean: comments, literals and preprocessor lines are blank, places unchanged
    std::vector<Function> functions;
    std::vector<Edit> edits;
    FILE* list = nullptr;
    int next = 0;
    std::string function;

    void blank() {
        clean = text;
        bool line_start = true;
        for (size_t i = 0; i < clean.size(); i++) {
            size_t end = i;
            if (line_start && clean[i] == '#')
                end = clean.find('\n', i);
            else if (!clean.compare(i, 2, "//"))
                end = clean.find('\n', i);
            else if (!clean.compare(i, 2, "/*"))
                end = clean.find("*/", i) + 2;
            else if (clean[i] == '"' || (clean[i] == '\'' && (i == 0 || !isalnum((unsigned char)clean[i - 1])))) {
                for (end = i + 1; clean[end] != clean[i]; end++)
                    if (clean[end] == '\\') end++;
                i++;  // the quotes stay
            }
            end = std::min(end, clean.size());
            for (; i < end; i++)
                if (clean[i] != '\n') clean[i] = ' ';
            line_start = i < clean.size() && (clean[i] == '\n' || (line_start && clean[i] == ' '));
        }
    }
    // Behind the bracket that closes the one at `at`.
    size_t behind(size_t at) const {
        int depth = 0;
        for (size_t i = at; i < clean.size(); i++) {
            if (strchr("([{", clean[i]))
                depth++;
            else if (strchr(")]}", clean[i]) && --depth == 0)
                return i + 1;
        }
        fail(at, "a bracket is not closed");
    }
    size_t skip_space(size_t i) const {
        while (i < clean.size() && isspace((unsigned char)clean[i])) i++;
        return i;
    }
    int line(size_t at) const { return 1 + (int)std::count(text.begin(), text.begin() + at, '\n'); }
    [[noreturn]] void fail(size_t at, const char* what) const {
        fprintf(stderr, "%s:%d: %s: %s\n", path.c_str(), line(at), what, text.substr(at, text.find('\n', at) - at).c_str());
        exit(1);
    }

    // Function definitions: `inline ... name(...) {` at the start of a line.
    void find_functions() {
        static const std::regex head(R"((?:^|\n)(?:inline|static) ([^;{}()=]*?)(\w+)\()");
        for (std::sregex_iterator it(clean.begin(), clean.end(), head), end; it != end; ++it) {
            size_t body = skip_space(behind(it->position(0) + it->length(0) - 1));
            if (body >= clean.size() || clean[body] != '{') continue;
            std::string type = (*it)[1];
            functions.push_back({(*it)[2], type == "real ", body + 1, behind(body) - 1});
        }
    }
    std::set<std::string> targets() const {
        std::map<std::string, std::set<std::string>> callers;
        static const std::regex word(R"(\w+)");
        std::set<std::string> names, chosen;
        for (const Function& f : functions) names.insert(f.name);
        for (const Function& f : functions)
            for (std::sregex_iterator it(clean.begin() + f.begin, clean.begin() + f.end, word), end; it != end; ++it)
                if (names.count(it->str()) && it->str() != f.name) callers[it->str()].insert(f.name);
        // Whatever is mentioned outside of functions (a table, a struct) has other callers than these.
        for (const std::string& n : names)
            if (n.find("backward") != std::string::npos) chosen.insert(n);
        for (bool more = true; more;) {
            more = false;
            for (const auto& c : callers) {
                if (chosen.count(c.first)) continue;
                bool all = true;
                for (const std::string& caller : c.second) all = all && chosen.count(caller);
                if (all) more = chosen.insert(c.first).second;
            }
        }
        return chosen;
    }

    int mutant(size_t begin, size_t end, const std::string& what) {
        std::string statement;
        for (char c : text.substr(begin, end - begin))
            if (!isspace((unsigned char)c))
                statement += c;
            else if (!statement.empty() && statement.back() != ' ')
                statement += ' ';
        fprintf(list, "%d\t%s:%d\t%s\t%s\t%s\n", next, path.c_str(), line(begin), function.c_str(), what.c_str(), statement.c_str());
        return next++;
    }
    void wrap(size_t begin, size_t end, const char* how, int n) {
        edits.push_back({begin, std::string("sabotage::") + how + "(" + std::to_string(n) + ", "});
        edits.push_back({end, ")"});
    }
    std::string piece(size_t begin, size_t end) const {
        begin = std::min(skip_space(begin), end);
        while (end > begin && isspace((unsigned char)clean[end - 1])) end--;
        return clean.substr(begin, end - begin);
    }
    // Where commas outside of brackets cut [begin, end).
    std::vector<size_t> cuts(size_t begin, size_t end) const {
        std::vector<size_t> at = {begin};
        for (size_t i = begin; i < end; i++) {
            if (strchr("([{", clean[i]))
                i = behind(i) - 1;
            else if (clean[i] == ',')
                at.push_back(i + 1);
        }
        at.push_back(end + 1);
        return at;
    }
    // Behind the last assignment operator outside of brackets; 0 if there is none.
    size_t right_side(size_t begin, size_t end) const {
        size_t found = 0;
        for (size_t i = begin; i < end; i++) {
            if (strchr("([{", clean[i]))
                i = behind(i) - 1;
            else if (clean[i] == '=' && clean[i + 1] == '=')
                i++;
            else if (clean[i] == '=' && !strchr("!<>", clean[i - 1]))
                found = skip_space(i + 1);
        }
        return found;
    }
    void negate(size_t begin, size_t end, size_t right, size_t right_end) {
        std::string value = piece(right, right_end);
        if (value == "0" || value == "(real)0" || value == "nullptr" || value[0] == '{') return;
        wrap(right, right_end, "negated", mutant(begin, end, "negate"));
    }

    // [begin, end) and then a semicolon.
    void statement(size_t begin, size_t end) {
        begin = skip_space(begin);
        if (begin >= end) return;
        std::string t = clean.substr(begin, end - begin);
        static const std::regex real_declaration(R"(^(const )?real\b)"), left_alone(R"(^(continue|break|assert|using|static|typedef)\b)"),
            declaration(R"(^(const |constexpr )?(struct )?[A-Za-z_][\w:]*(<[^;=]*?>)?[\s*&]+[A-Za-z_]\w*\s*([=({\[,][\s\S]*)?$)"),
            call(R"(^[A-Za-z_][\w:.\->\[\]]*\([\s\S]*\)$)");
        if (std::regex_search(t, left_alone)) return;
        if (!t.compare(0, 6, "return")) {
            for (const Function& f : functions)
                if (f.begin <= begin && begin < f.end && f.returns_real) negate(begin, end, skip_space(begin + 6), end);
            return;
        }
        if (std::regex_search(t, real_declaration)) {
            std::vector<size_t> at = cuts(begin, end);
            for (size_t i = 0; i + 1 < at.size(); i++) {
                size_t right = right_side(at[i], at[i + 1] - 1);
                if (right && clean.substr(at[i], right - at[i]).find_first_of("*&") == std::string::npos) negate(begin, end, right, at[i + 1] - 1);
            }
            return;
        }
        if (std::regex_match(t, declaration)) return;
        if (t.size() > 2 && t.substr(t.size() - 2) == "++") return keep_or_delete(begin, end);
        if (right_side(begin, end)) {
            std::vector<size_t> at = cuts(begin, end);
            for (size_t i = 0; i + 1 < at.size(); i++) {
                size_t right = right_side(at[i], at[i + 1] - 1);
                if (right) negate(begin, end, right, at[i + 1] - 1);
            }
            return keep_or_delete(begin, end);
        }
        if (std::regex_match(t, call)) {
            size_t open = clean.find('(', begin);
            if (behind(open) == end) {
                std::vector<size_t> at = cuts(open + 1, end - 1);
                for (size_t i = 0; i + 1 < at.size(); i++) {
                    std::string argument = piece(at[i], at[i + 1] - 1);
                    const char* how = argument == "true" || argument == "false"                              ? "turned"
                                      : argument == "-1" || (argument == "1" && !t.compare(0, 7, "matmul(")) ? "negated"
                                                                                                             : nullptr;
                    if (how) wrap(at[i], at[i + 1] - 1, how, mutant(begin, end, "turn " + std::to_string(i + 1)));
                }
            }
            return keep_or_delete(begin, end);
        }
        fail(begin, "a statement that was not understood");
    }
    void keep_or_delete(size_t begin, size_t end) {
        edits.push_back({begin, "{ if (sabotage::kept(" + std::to_string(mutant(begin, end, "delete")) + ")) "});
        edits.push_back({end + 1, " }"});
    }

    // The statements of a block: headers of if, for, while, else are stepped over; the bodies of lambdas are blocks too.
    void block(size_t begin, size_t end) {
        size_t start = begin;
        for (size_t i = begin; i < end; i++) {
            if (isspace((unsigned char)clean[i])) continue;
            if (skip_space(start) == i) {
                static const std::regex header(R"(^(if constexpr|if|for|while|switch)\s*\()"), other(R"(^(else|do)\b)");
                std::smatch m;
                std::string rest = clean.substr(i, std::min<size_t>(end - i, 40));
                if (std::regex_search(rest, m, header)) {
                    i = behind(i + m.length(0) - 1) - 1;
                    start = i + 1;
                    continue;
                }
                if (std::regex_search(rest, m, other)) {
                    i += m.length(0) - 1;
                    start = i + 1;
                    continue;
                }
                if (clean[i] == '{' || clean[i] == '}') {
                    start = i + 1;
                    continue;
                }
            }
            if (clean[i] == ';') {
                statement(start, i);
                start = i + 1;
            } else if (strchr("([{", clean[i])) {
                size_t close = behind(i) - 1;
                lambdas(i + 1, close);
                size_t before = clean.find_last_not_of(" \n", i - 1);
                if (clean[i] == '{' && clean[before] == ')' && clean.substr(start, i - start).find("](") != std::string::npos) block(i + 1, close);
                i = close;
            }
        }
    }
    // Lambdas among the arguments of a call.
    void lambdas(size_t begin, size_t end) {
        static const std::regex head(R"(\[[&=]?\]\s*\([^()]*\)\s*\{)");
        for (size_t from = begin; from < end;) {
            std::smatch m;
            std::string part = clean.substr(from, end - from);
            if (!std::regex_search(part, m, head)) return;
            size_t open = from + m.position(0) + m.length(0) - 1;
            block(open + 1, behind(open) - 1);
            from = behind(open);
        }
    }

    std::string edited() {
        std::stable_sort(edits.begin(), edits.end(), [](const Edit& a, const Edit& b) { return a.at < b.at; });
        std::string out;
        size_t done = 0;
        for (const Edit& e : edits) {
            out += text.substr(done, e.at - done) + e.text;
            done = e.at;
        }
        return preamble + out + text.substr(done);
    }
};

int main(int argc, char** argv) {
    if (argc != 5) return fprintf(stderr, "usage: sabotage FILE FIRST COPY LIST\n"), 2;
    Source s;
    std::ifstream in(argv[1]);
    std::stringstream all;
    all << in.rdbuf();
    if (!in) return fprintf(stderr, "cannot read %s\n", argv[1]), 3;
    s.path = argv[1];
    s.text = all.str();
    s.next = atoi(argv[2]);
    s.list = fopen(argv[4], "a");
    if (!s.list) return fprintf(stderr, "cannot write %s\n", argv[4]), 3;
    s.blank();
    s.find_functions();
    std::set<std::string> targets = s.targets();
    for (const Function& f : s.functions)
        if (targets.count(f.name)) {
            s.function = f.name;
            s.block(f.begin, f.end);
        }
    std::ofstream out(argv[3]);
    out << s.edited();
    out.close();
    if (fclose(s.list) || !out) return fprintf(stderr, "cannot write %s\n", argv[3]), 3;
    printf("%d\n", s.next);
    return 0;
}
