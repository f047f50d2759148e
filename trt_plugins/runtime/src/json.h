// What nlohmann's JSON parser reads, as the manifests need it: each value knows its place, for messages, and each number is kept as Python
// writes it, for the canonical form that quest-deploy hashes (quest_deploy/files.py, sha256_of_json): neither nlohmann's nor any other
// library writes floats so.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace quest_deploy {

class Json {
public:
    enum class Kind { null, boolean, number, string, array, object };

    /// Parse a whole document. Throws Error with `what` it is and where it goes wrong; that, and every later error about a value, ends with
    /// what to do.
    static Json parse(const std::string& text, const std::string& what, const std::string& repair);

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
    friend class JsonBuilder;
    [[noreturn]] void wrong(const char* expected) const;
    void write(std::string& out, const std::string& without) const;

    Kind kind_ = Kind::null;
    std::string text_;  ///< a string decoded to UTF-8, a number as Python writes it, or "true"
    std::vector<Json> items_;
    std::map<std::string, Json> members_;
    std::string path_;  ///< where it is, for messages
    std::shared_ptr<const std::string> repair_;
};

}  // namespace quest_deploy
