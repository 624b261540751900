#include "pattern.h"

#include <cstdio>
#include <exception>
#include <regex>

bool medusa_pattern_is_valid(const char* pattern, char* why, size_t n) {
    try {
        std::regex compiled(pattern);
        return true;
    } catch (const std::exception& error) {
        std::snprintf(why, n, "%s", error.what());
        return false;
    }
}
