#include "json.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <new>
#include <string_view>

#include "quest_deploy/error.h"

namespace quest_deploy {

namespace {

constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxMemory = std::size_t{1} << 28;  ///< bytes that a document's values may take; manifests need a few MiB

void append_utf8(std::string& out, std::uint32_t point) {
    if (point < 0x80) {
        out += static_cast<char>(point);
    } else if (point < 0x800) {
        out += static_cast<char>(0xC0 | (point >> 6));
        out += static_cast<char>(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
        out += static_cast<char>(0xE0 | (point >> 12));
        out += static_cast<char>(0x80 | ((point >> 6) & 0x3F));
        out += static_cast<char>(0x80 | (point & 0x3F));
    } else {
        out += static_cast<char>(0xF0 | (point >> 18));
        out += static_cast<char>(0x80 | ((point >> 12) & 0x3F));
        out += static_cast<char>(0x80 | ((point >> 6) & 0x3F));
        out += static_cast<char>(0x80 | (point & 0x3F));
    }
}

/// The code point that starts at `i` of valid or invalid UTF-8, and moves `i` behind it; 0xFFFFFFFF where it is invalid.
std::uint32_t next_point(const std::string& text, std::size_t& i) {
    const auto first = static_cast<unsigned char>(text[i++]);
    if (first < 0x80) return first;
    const int more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
    if (first < 0xC2 || first > 0xF4) return 0xFFFFFFFF;
    std::uint32_t point = first & (0x3F >> more);
    for (int k = 0; k < more; ++k) {
        if (i >= text.size() || (static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) return 0xFFFFFFFF;
        point = (point << 6) | (static_cast<unsigned char>(text[i++]) & 0x3F);
    }
    static constexpr std::uint32_t kLeast[] = {0x80, 0x800, 0x10000};
    const bool surrogate = point >= 0xD800 && point < 0xE000;
    return point < kLeast[more - 1] || surrogate || point > 0x10FFFF ? 0xFFFFFFFF : point;
}

void write_string(std::string& out, const std::string& text) {
    char escape[16];
    out += '"';
    for (std::size_t i = 0; i < text.size();) {
        const std::uint32_t point = next_point(text, i);
        switch (point) {
            case '"':
                out += "\\\"";
                break;
            case '\\':
                out += "\\\\";
                break;
            case '\b':
                out += "\\b";
                break;
            case '\f':
                out += "\\f";
                break;
            case '\n':
                out += "\\n";
                break;
            case '\r':
                out += "\\r";
                break;
            case '\t':
                out += "\\t";
                break;
            default:
                if (point >= 0x20 && point < 0x7F) {
                    out += static_cast<char>(point);
                } else if (point < 0x10000) {
                    static_cast<void>(std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(point)));
                    out += escape;
                } else {
                    const unsigned high = 0xD800 + ((point - 0x10000) >> 10), low = 0xDC00 + ((point - 0x10000) & 0x3FF);
                    static_cast<void>(std::snprintf(escape, sizeof escape, "\\u%04x\\u%04x", high, low));
                    out += escape;
                }
        }
    }
    out += '"';
}

}  // namespace

class JsonParser {
public:
    JsonParser(const std::string& text, const std::string& what, const std::string& repair)
        : text_(text), what_(what), repair_(std::make_shared<const std::string>(repair)) {}

    Json document() {
        Json value = parse(what_, 0);
        skip_space();
        if (at_ != text_.size()) fail("nothing more");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& expected) const {
        throw Error(what_ + " is damaged: expected " + expected + " at byte " + std::to_string(at_) + "; " + *repair_);
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    void skip_space() {
        while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) ++at_;
    }

    bool take(char wanted) {
        skip_space();
        if (peek() != wanted || at_ >= text_.size()) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) fail(std::string("'") + wanted + "'");
    }

    bool take_word(const char* word) {
        const std::string wanted = word;
        if (text_.compare(at_, wanted.size(), wanted) != 0) return false;
        at_ += wanted.size();
        return true;
    }

    // NOLINTBEGIN(misc-no-recursion): no deeper than kMaxDepth
    Json parse(const std::string& path, int depth) {
        if (depth > kMaxDepth) fail("less nesting");
        skip_space();
        memory_ += sizeof(Json) + path.size();
        if (memory_ > kMaxMemory) fail("a smaller document");
        Json value;
        value.path_ = path;
        value.repair_ = repair_;
        if (peek() == '{') {
            value.kind_ = Json::Kind::object;
            members(value, path, depth);
        } else if (peek() == '[') {
            value.kind_ = Json::Kind::array;
            items(value, path, depth);
        } else if (peek() == '"') {
            value.kind_ = Json::Kind::string;
            value.text_ = string();
        } else if (take_word("true")) {
            value.kind_ = Json::Kind::boolean;
            value.text_ = "true";
        } else if (take_word("false")) {
            value.kind_ = Json::Kind::boolean;
            value.text_ = "false";
        } else if (!take_word("null")) {
            value.kind_ = Json::Kind::number;
            value.text_ = number();
        }
        return value;
    }

    void members(Json& value, const std::string& path, int depth) {
        expect('{');
        if (take('}')) return;
        do {
            skip_space();
            if (peek() != '"') fail("a name");
            const std::string key = string();
            std::string place = path;
            place.append(": ").append(key);
            expect(':');
            if (!value.members_.emplace(key, parse(place, depth + 1)).second) fail("each name once, not again " + key);
        } while (take(','));
        expect('}');
    }

    void items(Json& value, const std::string& path, int depth) {
        expect('[');
        if (take(']')) return;
        do {
            value.items_.push_back(parse(path + "[" + std::to_string(value.items_.size()) + "]", depth + 1));
        } while (take(','));
        expect(']');
    }
    // NOLINTEND(misc-no-recursion)

    std::string number() {
        const std::size_t start = at_;
        if (peek() == '-') ++at_;
        if (peek() == '0') ++at_;
        else digits();
        if (peek() == '.') {
            ++at_;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        return text_.substr(start, at_ - start);
    }

    void digits() {
        if (peek() < '0' || peek() > '9') fail("a value");
        while (peek() >= '0' && peek() <= '9') ++at_;
    }

    std::uint32_t hex4() {
        std::uint32_t found = 0;
        const char* first = text_.data() + at_;
        if (text_.size() - at_ < 4 || std::from_chars(first, first + 4, found, 16).ptr != first + 4) fail("four hexadecimal digits");
        at_ += 4;
        return found;
    }

    std::string string() {
        std::string out;
        ++at_;
        while (peek() != '"') {
            if (at_ >= text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) fail("the string's end");
            if (text_[at_] != '\\') {
                const std::size_t start = at_;
                if (next_point(text_, at_) == 0xFFFFFFFF) fail("UTF-8");
                out.append(text_, start, at_ - start);
                continue;
            }
            ++at_;
            const char escaped = peek();
            ++at_;
            constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
            const std::size_t known = from.find(escaped);
            if (known != std::string_view::npos) {
                out += to[known];
            } else if (escaped == 'u') {
                std::uint32_t point = hex4();
                if (point >= 0xD800 && point < 0xDC00) {
                    if (!take_word("\\u")) fail("the second half of a character");
                    const std::uint32_t low = hex4();
                    if (low < 0xDC00 || low > 0xDFFF) fail("the second half of a character");
                    point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
                } else if (point >= 0xDC00 && point < 0xE000) {
                    fail("a whole character");
                }
                append_utf8(out, point);
            } else {
                fail("an escape");
            }
        }
        ++at_;
        return out;
    }

    const std::string& text_;
    const std::string& what_;
    std::shared_ptr<const std::string> repair_;
    std::size_t at_ = 0, memory_ = 0;
};

Json Json::parse(const std::string& text, const std::string& what, const std::string& repair) {
    try {
        return JsonParser(text, what, repair).document();
    } catch (const std::bad_alloc&) {
        throw Error(what + ": there is not enough memory to read it; " + repair);
    }
}

void Json::wrong(const char* expected) const {
    static const char* const names[] = {"null", "true or false", "a number", "a string", "a list", "an object"};
    throw Error(path_ + ": expected " + expected + ", found " + names[static_cast<int>(kind_)] + "; " + *repair_);
}

const Json* Json::find(const std::string& key) const {
    const auto& members = as_object();
    const auto found = members.find(key);
    return found == members.end() || found->second.kind_ == Kind::null ? nullptr : &found->second;
}

const Json& Json::at(const std::string& key) const {
    const Json* found = find(key);
    if (found == nullptr) throw Error(path_ + " has no " + key + "; " + *repair_);
    return *found;
}

const std::string& Json::as_string() const {
    if (kind_ != Kind::string) wrong("a string");
    return text_;
}

bool Json::as_bool() const {
    if (kind_ != Kind::boolean) wrong("true or false");
    return text_ == "true";
}

double Json::as_number() const {
    double found = 0;
    if (kind_ != Kind::number) wrong("a number");
    const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), found);
    if (error != std::errc() || end != text_.data() + text_.size() || !std::isfinite(found)) wrong("a number that fits a double");
    return found;
}

std::int64_t Json::as_integer() const {
    std::int64_t found = 0;
    if (kind_ != Kind::number) wrong("an integer");
    const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), found);
    if (error != std::errc() || end != text_.data() + text_.size()) wrong("an integer");
    return found;
}

const std::vector<Json>& Json::as_array() const {
    if (kind_ != Kind::array) wrong("a list");
    return items_;
}

const std::map<std::string, Json>& Json::as_object() const {
    if (kind_ != Kind::object) wrong("an object");
    return members_;
}

std::string Json::canonical(const std::string& without) const {
    std::string out;
    write(out, without);
    return out;
}

// NOLINTNEXTLINE(misc-no-recursion): no deeper than what was parsed
void Json::write(std::string& out, const std::string& without) const {
    switch (kind_) {
        case Kind::null:
            out += "null";
            return;
        case Kind::boolean:
        case Kind::number:
            out += text_;
            return;
        case Kind::string:
            write_string(out, text_);
            return;
        case Kind::array:
            out += '[';
            for (const Json& item : items_) {
                if (&item != &items_.front()) out += ',';
                item.write(out, "");
            }
            out += ']';
            return;
        case Kind::object: {
            out += '{';
            bool first = true;
            for (const auto& [key, member] : members_) {
                if (!without.empty() && key == without) continue;
                if (!first) out += ',';
                first = false;
                write_string(out, key);
                out += ':';
                member.write(out, "");
            }
            out += '}';
        }
    }
}

}  // namespace quest_deploy
