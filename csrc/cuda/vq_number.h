#pragma once

namespace fastseq::cuda {

enum class Number { f32, bf16, f16 };

}  // namespace fastseq::cuda
