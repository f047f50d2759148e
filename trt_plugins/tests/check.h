/// Checks of the test programs: each prints a line, and the program fails if one did.
#pragma once

#include <cstdio>
#include <string>

namespace quest::test {

class Checks {
public:
    void check(bool passed, const std::string& claim) {
        std::printf("%s %s\n", passed ? "ok    " : "FAILED", claim.c_str());
        mFailed += passed ? 0 : 1;
        ++mCount;
    }

    /// The exit status.
    int report() const {
        std::printf("%d checks, %d failed\n", mCount, mFailed);
        return mFailed == 0 ? 0 : 1;
    }

private:
    int mCount = 0;
    int mFailed = 0;
};

}  // namespace quest::test
