// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/gguf_parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "src/io/text_format.h"

namespace metal_lora::io {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF and safetensors are little-endian");

constexpr uint64_t kMaxAlignment = uint64_t{1} << 20;
// The least that one entry of each kind takes in the header.
constexpr uint64_t kMinValueBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 4 + 8;

struct GgmlType {
  uint32_t id;
  std::string_view name;
  std::optional<TensorType> type;  ///< nullopt: known, but not read here
};

constexpr GgmlType kGgmlTypes[] = {
    {0, "F32", TensorType::f32},
    {1, "F16", TensorType::f16},
    {2, "Q4_0", TensorType::q4_0},
    {3, "Q4_1", TensorType::q4_1},
    {6, "Q5_0", TensorType::q5_0},
    {7, "Q5_1", TensorType::q5_1},
    {8, "Q8_0", TensorType::q8_0},
    {9, "Q8_1", {}},
    {10, "Q2_K", {}},
    {11, "Q3_K", {}},
    {12, "Q4_K", TensorType::q4_k},
    {13, "Q5_K", TensorType::q5_k},
    {14, "Q6_K", TensorType::q6_k},
    {15, "Q8_K", {}},
    {16, "IQ2_XXS", {}},
    {17, "IQ2_XS", {}},
    {18, "IQ3_XXS", {}},
    {19, "IQ1_S", {}},
    {20, "IQ4_NL", {}},
    {21, "IQ3_S", {}},
    {22, "IQ2_S", {}},
    {23, "IQ4_XS", {}},
    {24, "I8", TensorType::i8},
    {25, "I16", TensorType::i16},
    {26, "I32", TensorType::i32},
    {27, "I64", TensorType::i64},
    {28, "F64", TensorType::f64},
    {29, "IQ1_M", {}},
    {30, "BF16", TensorType::bf16},
    {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},
    {39, "MXFP4", {}},
};

bool is_known_value_type(uint32_t type) {
  return type <= static_cast<uint32_t>(GgufValueType::f64);
}

}  // namespace

uint64_t gguf_scalar_bytes(GgufValueType type) {
  switch (type) {
    case GgufValueType::u8:
    case GgufValueType::i8:
    case GgufValueType::boolean:
      return 1;
    case GgufValueType::u16:
    case GgufValueType::i16:
      return 2;
    case GgufValueType::u32:
    case GgufValueType::i32:
    case GgufValueType::f32:
      return 4;
    case GgufValueType::u64:
    case GgufValueType::i64:
    case GgufValueType::f64:
      return 8;
    case GgufValueType::string:
    case GgufValueType::array:
      return 0;
  }
  return 0;
}

GgufParser::GgufParser(std::shared_ptr<const MappedFile> file)
    : file_(std::move(file)), bytes_(file_->bytes()) {}

Failure GgufParser::failure(
    uint64_t offset, std::string field, std::string expected, std::string got) const {
  return Failure{
      ErrorCode::invalid_input,
      file_->path(),
      offset,
      std::move(field),
      std::move(expected),
      std::move(got),
      ""};
}

Result<void> GgufParser::read_preamble(uint64_t& tensor_count, uint64_t& value_count) {
  uint32_t magic = 0;
  uint32_t version = 0;
  if (!read(magic) || magic != 0x46554747u) {
    return failure(0, "magic", "\"GGUF\"", "something else");
  }
  if (!read(version)) return failure(4, "version", "2 or 3", "beyond the end of the file");
  if (version != 2 && version != 3) {
    Failure wrong = failure(4, "version", "2 or 3", std::to_string(version));
    wrong.code = ErrorCode::unsupported;
    if (std::rotr(version, 24) <= 0xff) wrong.hint = "big-endian GGUF files are not read";
    return wrong;
  }
  result_.version_ = version;
  if (!read(tensor_count) || !read(value_count)) {
    return failure(8, "counts", "two 64-bit numbers", "beyond the end of the file");
  }
  if (tensor_count > kGgufMaxTensors || tensor_count > remaining() / kMinTensorBytes) {
    return failure(
        8,
        "tensor count",
        fmt::format("at most {}", std::min(kGgufMaxTensors, remaining() / kMinTensorBytes)),
        std::to_string(tensor_count));
  }
  if (value_count > kGgufMaxKeys || value_count > remaining() / kMinValueBytes) {
    return failure(
        16,
        "metadata count",
        fmt::format("at most {}", std::min(kGgufMaxKeys, remaining() / kMinValueBytes)),
        std::to_string(value_count));
  }
  return {};
}

Result<std::string_view> GgufParser::read_string(const std::string& field, uint64_t max_bytes) {
  const uint64_t start = at_;
  uint64_t length = 0;
  if (!read(length)) {
    return failure(start, field, "a string", "cut short by the end of the file");
  }
  if (length > max_bytes || length > remaining()) {
    return failure(
        start,
        field + " length",
        fmt::format("at most {}", std::min(max_bytes, remaining())),
        std::to_string(length));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes_.data()) + at_, length);
  at_ += length;
  return text;
}

// Leaves `value.payload` on the elements and the cursor behind them. Nested arrays are walked, so
// that what follows is found, and bounded by depth; no getter returns them.
Result<void> GgufParser::skip_array(GgufValue& value, int depth) {
  const std::string field = quote_text(value.key);
  const uint64_t start = at_;
  uint32_t element_type = 0;
  uint64_t count = 0;
  if (!read(element_type) || !read(count)) {
    return failure(start, field, "an array", "cut short by the end of the file");
  }
  if (!is_known_value_type(element_type)) {
    return failure(start, field, "an array of a known type", fmt::format("type {}", element_type));
  }
  if (count > kGgufMaxArrayElements) {
    return failure(
        start,
        field,
        fmt::format("at most {} elements long", kGgufMaxArrayElements),
        std::to_string(count));
  }
  value.element_type = static_cast<GgufValueType>(element_type);
  value.count = count;
  const uint64_t begin = at_;
  if (value.element_type == GgufValueType::string) {
    for (uint64_t i = 0; i < count; ++i) {
      uint64_t length = 0;
      const uint64_t at = at_;
      if (!read(length) || length > kGgufMaxStringBytes || length > remaining()) {
        return failure(
            at,
            fmt::format("{}[{}]", field, i),
            "a string within the file",
            fmt::format("{} bytes long", length));
      }
      at_ += length;
    }
  } else if (value.element_type == GgufValueType::array) {
    if (depth + 1 >= kGgufMaxArrayDepth) {
      return failure(start, field, fmt::format("at most {} deep", kGgufMaxArrayDepth), "deeper");
    }
    for (uint64_t i = 0; i < count; ++i) {
      GgufValue inner;
      inner.key = value.key;
      if (auto skipped = skip_array(inner, depth + 1); !skipped) return skipped;
    }
  } else {
    const CheckedSize bytes = CheckedSize(count) * gguf_scalar_bytes(value.element_type);
    if (!bytes.at_most(remaining())) {
      return failure(
          start, field, "an array within the file", fmt::format("{} elements long", count));
    }
    at_ += *bytes.get();
  }
  value.offset = begin;
  value.payload = bytes_.subspan(begin, at_ - begin);
  return {};
}

Result<void> GgufParser::read_value(GgufValue& value) {
  const uint64_t start = at_;
  const auto key = read_string("metadata key", kGgufMaxKeyBytes);
  if (!key) return key.error();
  if (key->empty() || std::any_of(key->begin(), key->end(), [](char c) {
        return static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
      })) {
    return failure(start, "metadata key", "printable and not empty", quote_text(*key));
  }
  value.key = *key;
  const std::string field = quote_text(*key);
  uint32_t type = 0;
  if (!read(type)) return failure(at_, field, "a value", "cut short by the end of the file");
  if (!is_known_value_type(type)) {
    return failure(at_ - 4, field, "of a known type, 0 to 12", fmt::format("type {}", type));
  }
  value.type = static_cast<GgufValueType>(type);
  if (value.type == GgufValueType::array) return skip_array(value, 0);
  if (value.type == GgufValueType::string) {
    const auto text = read_string(field, kGgufMaxStringBytes);
    if (!text) return text.error();
    value.payload = std::as_bytes(std::span(*text));
    value.offset = at_ - text->size();
    return {};
  }
  const uint64_t bytes = gguf_scalar_bytes(value.type);
  if (remaining() < bytes) {
    return failure(at_, field, "a value", "cut short by the end of the file");
  }
  value.offset = at_;
  value.payload = bytes_.subspan(at_, bytes);
  at_ += bytes;
  if (value.type == GgufValueType::boolean && std::to_integer<int>(value.payload[0]) > 1) {
    return failure(
        value.offset,
        field,
        "0 or 1, a boolean",
        std::to_string(std::to_integer<int>(value.payload[0])));
  }
  return {};
}

Result<void> GgufParser::index_values() {
  auto& order = result_.values_by_key_;
  const auto& values = result_.values_;
  order.resize(values.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return values[a].key < values[b].key;
  });
  for (size_t i = 1; i < order.size(); ++i) {
    if (values[order[i]].key == values[order[i - 1]].key) {
      return failure(
          values[std::max(order[i], order[i - 1])].offset,
          quote_text(values[order[i]].key),
          "a key that occurs once",
          "there twice");
    }
  }
  result_.file_ = file_;
  if (!result_.has("general.alignment")) return {};
  const auto alignment = result_.get_u32("general.alignment");
  if (!alignment) return alignment.error();
  if (!std::has_single_bit(*alignment) || *alignment > kMaxAlignment) {
    return failure(
        result_.find_value("general.alignment")->offset,
        "\"general.alignment\"",
        fmt::format("a power of two up to {}", kMaxAlignment),
        std::to_string(*alignment));
  }
  result_.alignment_ = *alignment;
  return {};
}

Result<void> GgufParser::read_tensor_type(Pending& pending, const std::string& field) {
  const uint64_t start = at_;
  uint32_t id = 0;
  if (!read(id)) return failure(start, field, "a type", "cut short by the end of the file");
  const auto found = std::find_if(
      std::begin(kGgmlTypes), std::end(kGgmlTypes), [&](const auto& t) { return t.id == id; });
  if (found == std::end(kGgmlTypes) || !found->type) {
    Failure wrong = failure(
        start,
        field + " type",
        "one of F32 F16 BF16 F64 I8 I16 I32 I64 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K",
        found == std::end(kGgmlTypes) ? fmt::format("type number {}", id)
                                      : std::string(found->name));
    if (found != std::end(kGgmlTypes)) {
      wrong.code = ErrorCode::unsupported;
      wrong.hint = "use a file quantised as Q4_0, Q4_1, Q8_0, Q4_K_M or Q6_K";
    }
    return wrong;
  }
  pending.tensor.type = *found->type;
  return {};
}

Result<void> GgufParser::read_tensor_entry(Pending& pending) {
  pending.entry_offset = at_;
  const auto name = read_string("tensor name", kTensorNameMaxBytes);
  if (!name) return name.error();
  if (name->empty() || name->find('\0') != std::string_view::npos) {
    return failure(
        pending.entry_offset, "tensor name", "not empty and without NUL", quote_text(*name));
  }
  const std::string field = quote_text(*name);
  TensorInfo& tensor = pending.tensor;
  tensor.name = *name;
  uint32_t dims = 0;
  if (!read(dims)) return failure(at_, field, "dimensions", "cut short by the end of the file");
  if (dims > kGgufMaxDims) {
    return failure(
        at_ - 4,
        field,
        fmt::format("of at most {} dimensions", kGgufMaxDims),
        std::to_string(dims));
  }
  tensor.shape.resize(dims);
  for (uint32_t i = 0; i < dims; ++i) {
    // The file has the innermost dimension first.
    uint64_t& dim = tensor.shape[dims - 1 - i];
    if (!read(dim)) return failure(at_, field, "dimensions", "cut short by the end of the file");
    if (dim == 0) return failure(at_ - 8, field, "of dimensions of at least 1", "0");
  }
  if (auto typed = read_tensor_type(pending, field); !typed) return typed;
  const auto bytes = count_bytes(tensor.type, tensor.shape).get();
  if (!bytes) {
    return failure(
        pending.entry_offset,
        field,
        fmt::format(
            "below 2^64 bytes, in rows of whole blocks of {}",
            tensor_type_traits(tensor.type).block_elements),
        format_shape(tensor.shape));
  }
  tensor.nbytes = *bytes;
  if (!read(pending.relative_offset)) {
    return failure(at_, field, "an offset", "cut short by the end of the file");
  }
  if (pending.relative_offset % result_.alignment_ != 0) {
    return failure(
        at_ - 8,
        field + " offset",
        fmt::format("a multiple of {}", result_.alignment_),
        std::to_string(pending.relative_offset));
  }
  return {};
}

Result<void> GgufParser::place_tensors(std::vector<Pending>& pending) {
  if (pending.empty()) return {};
  const CheckedSize data_offset = CheckedSize(at_).rounded_up_to(result_.alignment_);
  for (Pending& entry : pending) {
    const CheckedSize begin = data_offset + entry.relative_offset;
    if (!(begin + entry.tensor.nbytes).at_most(bytes_.size())) {
      Failure cut = failure(
          entry.entry_offset,
          quote_text(entry.tensor.name),
          fmt::format("within the {} bytes of the file", bytes_.size()),
          fmt::format("{} bytes from {}", entry.tensor.nbytes, entry.relative_offset));
      cut.hint = "the file is cut short: download or copy it again";
      return cut;
    }
    entry.tensor.data = bytes_.data() + *begin.get();
    entry.tensor.file = file_;
  }
  std::vector<const Pending*> order;
  order.reserve(pending.size());
  for (const Pending& entry : pending) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const Pending* a, const Pending* b) {
    return a->tensor.data < b->tensor.data;
  });
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo& before = order[i - 1]->tensor;
    if (before.data + before.nbytes > order[i]->tensor.data) {
      return failure(
          order[i]->entry_offset,
          quote_text(order[i]->tensor.name),
          "apart from other tensors",
          "overlapping " + quote_text(before.name));
    }
  }
  result_.tensors_.reserve(pending.size());
  for (Pending& entry : pending) result_.tensors_.push_back(std::move(entry.tensor));
  return {};
}

Result<GgufFile> GgufParser::parse() {
  uint64_t tensor_count = 0;
  uint64_t value_count = 0;
  if (auto read = read_preamble(tensor_count, value_count); !read) return std::move(read).error();
  result_.values_.resize(value_count);
  for (GgufValue& value : result_.values_) {
    if (auto read = read_value(value); !read) return std::move(read).error();
  }
  if (auto indexed = index_values(); !indexed) return std::move(indexed).error();
  std::vector<Pending> pending(tensor_count);
  for (Pending& entry : pending) {
    if (auto read = read_tensor_entry(entry); !read) return std::move(read).error();
  }
  if (auto placed = place_tensors(pending); !placed) return std::move(placed).error();
  result_.index_ = TensorIndex(result_.tensors_);
  if (const auto duplicate = result_.index_.duplicate(result_.tensors_)) {
    return failure(24, quote_text(*duplicate), "a tensor name that occurs once", "there twice");
  }
  return std::move(result_);
}

}  // namespace metal_lora::io
