// Large scratch is kept between calls: memory fresh from the system costs a page fault per 4 KB, a fifth of a call.
#pragma once
#include <cstddef>

namespace sfk {

// 64-byte aligned; throws std::bad_alloc.
void* take_scratch(std::size_t bytes);
void give_scratch(void* p, std::size_t bytes) noexcept;

}  // namespace sfk
