#pragma once

#include <stdexcept>

namespace quest_deploy {

/// What every function of this library throws: what was expected, what was found and what to do.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

}  // namespace quest_deploy
