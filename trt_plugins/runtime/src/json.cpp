#include "json.h"

#include <array>
#include <charconv>
#include <cmath>
#include <new>
#include <utility>

#include <nlohmann/json.hpp>

#include "quest_deploy/error.h"

static_assert(NLOHMANN_JSON_VERSION_MAJOR > 3 || NLOHMANN_JSON_VERSION_MINOR >= 12,
              "expected nlohmann's JSON 3.12 or newer: those before give a float's text with the locale's decimal point");

namespace quest_deploy {

namespace {

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kMaxMemory = std::size_t{1} << 28;  ///< bytes that a document's values may take; manifests need a few MiB

/// As Python's repr writes it: the fewest digits that give the number back, with an exponent where that is below -4 or above 15.
std::string float_text(double value) {
    std::array<char, 32> digits{};
    const auto text = [&](std::chars_format format) {
        return std::string(digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value, format).ptr);
    };
    std::string scientific = text(std::chars_format::scientific);
    const int exponent = std::stoi(scientific.substr(scientific.find('e') + 1));
    if (exponent < -4 || exponent > 15) return scientific;
    const std::string fixed = text(std::chars_format::fixed);
    return fixed.find('.') == std::string::npos ? fixed + ".0" : fixed;
}

std::string quoted(const std::string& text) { return nlohmann::json(text).dump(-1, ' ', true); }

}  // namespace

/// Makes a document of the events of nlohmann's parser.
class JsonBuilder {
public:
    JsonBuilder(const std::string& what, const std::string& repair) : what_(what), repair_(std::make_shared<const std::string>(repair)) {}

    Json document() { return std::move(root_); }

    bool null() { return add(Json::Kind::null, "null"); }
    bool boolean(bool value) { return add(Json::Kind::boolean, value ? "true" : "false"); }
    bool number_integer(std::int64_t value) { return add(Json::Kind::number, std::to_string(value)); }
    bool number_unsigned(std::uint64_t value) { return add(Json::Kind::number, std::to_string(value)); }
    bool number_float(double value, const std::string& text) {
        const bool whole = text.find_first_of(".eE") == std::string::npos;  // an integer of more than 64 bits, which Python keeps
        return add(Json::Kind::number, whole ? text : float_text(value));
    }
    bool string(const std::string& value) { return add(Json::Kind::string, value); }
    bool binary(const nlohmann::json::binary_t& /*value*/) { return false; }  // JSON has none
    bool start_object(std::size_t /*size*/) { return open(Json::Kind::object); }
    bool start_array(std::size_t /*size*/) { return open(Json::Kind::array); }
    bool end_object() { return close(); }
    bool end_array() { return close(); }

    bool key(const std::string& name) {
        key_ = name;
        return true;
    }

    bool parse_error(std::size_t position, const std::string& /*token*/, const nlohmann::json::exception& /*error*/) const {
        throw Error(what_ + " is damaged: expected JSON, found something else at byte " + std::to_string(position) + "; " + *repair_);
    }

private:
    bool add(Json::Kind kind, const std::string& text) {
        place(kind).text_ = text;
        return true;
    }

    bool open(Json::Kind kind) {
        open_.push_back(&place(kind));
        if (open_.size() > kMaxDepth) fail(*open_.back(), "at most " + std::to_string(kMaxDepth) + " levels");
        return true;
    }

    bool close() {
        open_.pop_back();
        return true;
    }

    /// A new value where the parser is. What `open_` points to stays where it is: only the innermost container grows.
    Json& place(Json::Kind kind) {
        Json value;
        value.kind_ = kind;
        value.repair_ = repair_;
        value.path_ = what_;
        Json* placed = &root_;
        if (open_.empty()) {
            root_ = std::move(value);
        } else if (Json& parent = *open_.back(); parent.kind_ == Json::Kind::array) {
            value.path_ = parent.path_ + "[" + std::to_string(parent.items_.size()) + "]";
            placed = &parent.items_.emplace_back(std::move(value));
        } else {
            value.path_ = parent.path_ + ": " + key_;
            const auto [member, added] = parent.members_.emplace(key_, std::move(value));
            if (!added) fail(member->second, "this name once, found it again");
            placed = &member->second;
        }
        memory_ += sizeof(Json) + placed->path_.size();
        if (memory_ > kMaxMemory) fail(*placed, "a smaller document");
        return *placed;
    }

    [[noreturn]] static void fail(const Json& place, const std::string& expected) {
        throw Error(place.path_ + ": expected " + expected + "; " + *place.repair_);
    }

    const std::string& what_;
    std::shared_ptr<const std::string> repair_;
    Json root_;
    std::vector<Json*> open_;  ///< the containers that the parser is in
    std::string key_;          ///< of the member that comes next
    std::size_t memory_ = 0;
};

Json Json::parse(const std::string& text, const std::string& what, const std::string& repair) {
    try {
        JsonBuilder builder(what, repair);
        nlohmann::json::sax_parse(text, &builder);
        return builder.document();
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
            out += quoted(text_);
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
                out += quoted(key);
                out += ':';
                member.write(out, "");
            }
            out += '}';
        }
    }
}

}  // namespace quest_deploy
