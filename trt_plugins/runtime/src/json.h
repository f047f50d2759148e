// A strict JSON reader (RFC 8259) of just what the manifests need: it keeps each number's text, so that the canonical form that
// quest-deploy hashes (quest_deploy/files.py, sha256_of_json) can be written back digit for digit, which JSON libraries do not offer. It
// has no dependency, so that these checks build and are tested wherever there is a C++ compiler.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace quest_deploy {

class Json {
public:
    enum class Kind { null, boolean, number, string, array, object };

    /// Parse a whole document; throws Error with `what` it is and the byte where it goes wrong.
    static Json parse(const std::string& text, const std::string& what);

    Kind kind() const { return kind_; }

    /// A member of an object; throws Error where there is none.
    const Json& at(const std::string& key) const;
    /// A member of an object, or null where there is none or it is JSON's null.
    const Json* find(const std::string& key) const;

    const std::string& as_string() const;
    bool as_bool() const;
    double as_number() const;
    std::int64_t as_integer() const;
    const std::vector<Json>& as_array() const;
    const std::map<std::string, Json>& as_object() const;

    /// As Python's json.dumps(value, sort_keys=True, separators=(",", ":")) writes it, the object's member `without` left out.
    std::string canonical(const std::string& without = "") const;

private:
    friend class JsonParser;
    [[noreturn]] void wrong(const char* expected) const;
    void write(std::string& out, const std::string& without) const;

    Kind kind_ = Kind::null;
    std::string text_;  ///< a string decoded to UTF-8, a number as it was written, or "true"
    std::vector<Json> items_;
    std::map<std::string, Json> members_;
    std::string path_;  ///< where it is, for messages
};

}  // namespace quest_deploy
