// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "src/io/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "src/io/safetensors_types.h"
#include "src/io/text_format.h"
#include "src/io/tracked_text.h"

namespace metal_lora::io {
namespace {

constexpr uint64_t kPrefixBytes = 8;
// `"a":{"dtype":"U8","shape":[],"data_offsets":[0,0]},` and nothing shorter.
constexpr uint64_t kMinEntryBytes = 48;

// Takes the header's events straight into tensors: a DOM of it would cost 20x its size. Data
// pointers are set later; `data_begin` waits in begins().
class HeaderBuilder : public nlohmann::json_sax<nlohmann::json> {
 public:
  HeaderBuilder(const std::string& path, const TrackedText& text, uint64_t header_bytes)
      : text_(text) {
    failure_.path = path;
    const uint64_t most = std::min(kSafetensorsMaxTensors, header_bytes / kMinEntryBytes + 1);
    tensors_.reserve(most);
    begins_.reserve(most);
  }

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  // The parser calls this for a leading minus only, "-0" included.
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t& text) override {
    return unexpected("the number " + text.substr(0, 40));
  }
  bool binary(binary_t&) override { return unexpected("binary"); }
  bool number_unsigned(number_unsigned_t value) override;
  bool string(string_t& value) override;
  bool key(string_t& value) override;
  bool start_object(size_t) override;
  bool end_object() override;
  bool start_array(size_t) override;
  bool end_array() override;
  bool parse_error(
      size_t position, const std::string& token, const nlohmann::json::exception&) override {
    failure_.offset = kPrefixBytes + (position == 0 ? 0 : position - 1);
    failure_.field = "header";
    failure_.expected = "valid JSON in UTF-8";
    failure_.got = "broken near " + quote_text(token, 40);
    return false;
  }

  std::vector<TensorInfo>& tensors() { return tensors_; }
  std::vector<uint64_t>& begins() { return begins_; }
  std::map<std::string, std::string>& metadata() { return metadata_; }
  Failure& failure() { return failure_; }

 private:
  enum class Place { before, root, metadata, tensor_value, tensor, dtype, shape, offsets, after };
  enum Member : uint8_t { kDtype = 1, kShape = 2, kOffsets = 4, kAllMembers = 7 };

  bool fail(std::string field, std::string expected, std::string got) {
    failure_.offset = kPrefixBytes + text_.offset();
    failure_.field = std::move(field);
    failure_.expected = std::move(expected);
    failure_.got = std::move(got);
    return false;
  }
  std::string field_name() const;
  const char* expectation() const;
  bool unexpected(std::string got) { return fail(field_name(), expectation(), std::move(got)); }
  bool root_key(string_t& value);
  bool member_key(const string_t& value);
  bool finish_tensor();

  const TrackedText& text_;
  Place place_ = Place::before;
  bool metadata_seen_ = false;
  bool metadata_open_ = false;
  bool in_array_ = false;
  uint8_t members_ = 0;
  std::string metadata_key_;
  uint64_t offsets_[2] = {0, 0};
  size_t offset_count_ = 0;
  std::vector<TensorInfo> tensors_;
  std::vector<uint64_t> begins_;
  std::map<std::string, std::string> metadata_;
  Failure failure_;
};

std::string HeaderBuilder::field_name() const {
  switch (place_) {
    case Place::before:
    case Place::root:
    case Place::after:
      return "header";
    case Place::metadata:
      return !metadata_open_ ? "__metadata__" : "__metadata__." + quote_text(metadata_key_);
    case Place::dtype:
      return quote_text(tensors_.back().name) + ".dtype";
    case Place::shape:
      return quote_text(tensors_.back().name) + ".shape";
    case Place::offsets:
      return quote_text(tensors_.back().name) + ".data_offsets";
    default:
      return quote_text(tensors_.back().name);
  }
}

const char* HeaderBuilder::expectation() const {
  switch (place_) {
    case Place::metadata:
      return "an object of strings";
    case Place::dtype:
      return "the name of a type";
    case Place::shape:
      return "an array of sizes from 0 to 2^64-1";
    case Place::offsets:
      return "an array of two offsets from 0 to 2^64-1";
    case Place::tensor_value:
    case Place::tensor:
      return "an object with dtype, shape and data_offsets";
    default:
      return "one JSON object";
  }
}

bool HeaderBuilder::number_unsigned(number_unsigned_t value) {
  if (place_ == Place::shape && in_array_) {
    auto& shape = tensors_.back().shape;
    if (shape.size() == kSafetensorsMaxDims) {
      return fail(field_name(), fmt::format("at most {} sizes", kSafetensorsMaxDims), "longer");
    }
    shape.push_back(value);
    return true;
  }
  if (place_ == Place::offsets && in_array_ && offset_count_ < 2) {
    offsets_[offset_count_++] = value;
    return true;
  }
  return unexpected(fmt::format("the number {}", value));
}

bool HeaderBuilder::string(string_t& value) {
  if (place_ == Place::metadata && metadata_open_) {
    if (!metadata_.emplace(metadata_key_, std::move(value)).second) {
      return fail(field_name(), "a key that occurs once", "there twice");
    }
    return true;
  }
  if (place_ == Place::dtype) {
    const auto type = safetensors_type(value);
    if (!type) {
      failure_.code = ErrorCode::unsupported;
      return fail(field_name(), "one of " + safetensors_type_names(), quote_text(value, 40));
    }
    tensors_.back().type = *type;
    place_ = Place::tensor;
    return true;
  }
  return unexpected("the string " + quote_text(value, 40));
}

bool HeaderBuilder::key(string_t& value) {
  if (place_ == Place::metadata) {
    if (metadata_.size() == kSafetensorsMaxMetadataEntries) {
      return fail(
          "__metadata__",
          fmt::format("at most {} entries", kSafetensorsMaxMetadataEntries),
          "more");
    }
    if (value.find('\0') != std::string::npos) {
      return fail("__metadata__", "without NUL in its keys", quote_text(value));
    }
    metadata_key_ = std::move(value);
    return true;
  }
  return place_ == Place::root ? root_key(value) : member_key(value);
}

bool HeaderBuilder::root_key(string_t& value) {
  if (value == "__metadata__") {
    if (metadata_seen_) return fail(value, "a key that occurs once", "there twice");
    metadata_seen_ = true;
    place_ = Place::metadata;
    return true;
  }
  if (value.empty() || value.size() > kTensorNameMaxBytes ||
      value.find('\0') != std::string::npos) {
    return fail(
        "header",
        fmt::format("tensor names of 1 to {} bytes without NUL", kTensorNameMaxBytes),
        fmt::format("{} of {} bytes", quote_text(value, 40), value.size()));
  }
  if (tensors_.size() == kSafetensorsMaxTensors) {
    return fail("header", fmt::format("at most {} tensors", kSafetensorsMaxTensors), "more");
  }
  tensors_.emplace_back().name = std::move(value);
  members_ = 0;
  offset_count_ = 0;
  place_ = Place::tensor_value;
  return true;
}

bool HeaderBuilder::member_key(const string_t& value) {
  const uint8_t member = value == "dtype"          ? kDtype
                         : value == "shape"        ? kShape
                         : value == "data_offsets" ? kOffsets
                                                   : 0;
  if (member == 0) {
    return fail(
        field_name(), "dtype, shape and data_offsets alone", "with " + quote_text(value, 40));
  }
  if ((members_ & member) != 0) {
    return fail(field_name() + "." + value, "a key that occurs once", "there twice");
  }
  members_ |= member;
  place_ = member == kDtype ? Place::dtype : member == kShape ? Place::shape : Place::offsets;
  return true;
}

bool HeaderBuilder::start_object(size_t) {
  switch (place_) {
    case Place::before:
      place_ = Place::root;
      return true;
    case Place::tensor_value:
      place_ = Place::tensor;
      return true;
    case Place::metadata:
      if (metadata_open_) return unexpected("an object");
      metadata_open_ = true;
      return true;
    default:
      return unexpected("an object");
  }
}

bool HeaderBuilder::end_object() {
  if (place_ == Place::metadata) {
    metadata_open_ = false;
    place_ = Place::root;
    return true;
  }
  if (place_ == Place::tensor) return finish_tensor();
  place_ = Place::after;
  return true;
}

bool HeaderBuilder::start_array(size_t) {
  if ((place_ != Place::shape && place_ != Place::offsets) || in_array_) {
    return unexpected("an array");
  }
  in_array_ = true;
  return true;
}

bool HeaderBuilder::end_array() {
  if (place_ == Place::offsets && offset_count_ != 2) {
    return unexpected(fmt::format("an array of {}", offset_count_));
  }
  in_array_ = false;
  place_ = Place::tensor;
  return true;
}

bool HeaderBuilder::finish_tensor() {
  TensorInfo& tensor = tensors_.back();
  const std::string name = quote_text(tensor.name);
  if (members_ != kAllMembers) {
    const char* missing = (members_ & kDtype) == 0   ? "dtype"
                          : (members_ & kShape) == 0 ? "shape"
                                                     : "data_offsets";
    return fail(name, expectation(), fmt::format("without {}", missing));
  }
  if (offsets_[1] < offsets_[0]) {
    return fail(
        name + ".data_offsets",
        "in ascending order",
        fmt::format("[{}, {}]", offsets_[0], offsets_[1]));
  }
  tensor.nbytes = offsets_[1] - offsets_[0];
  const CheckedSize needed = count_bytes(tensor.type, tensor.shape);
  if (!needed.equals(tensor.nbytes)) {
    const auto bytes = needed.get();
    return fail(
        name,
        fmt::format(
            "{} bytes long for {} {}",
            bytes ? std::to_string(*bytes) : "more than 2^64",
            tensor_type_name(tensor.type),
            format_shape(tensor.shape)),
        fmt::format("{}", tensor.nbytes));
  }
  begins_.push_back(offsets_[0]);
  place_ = Place::root;
  return true;
}

// Orders tensors by their data and lets each begin where the one before ends.
Result<void> place_tensors(
    std::vector<TensorInfo>& tensors,
    const std::vector<uint64_t>& begins,
    const std::shared_ptr<const MappedFile>& file,
    uint64_t data_offset) {
  Failure failure;
  failure.path = file->path();
  std::vector<uint32_t> order(tensors.size());
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    if (begins[a] != begins[b]) return begins[a] < begins[b];
    // Empty tensors come before the one that starts where they do.
    if ((tensors[a].nbytes == 0) != (tensors[b].nbytes == 0)) return tensors[a].nbytes == 0;
    return tensors[a].name < tensors[b].name;
  });
  const uint64_t data_bytes = file->size() - data_offset;
  CheckedSize end(0u);
  std::vector<TensorInfo> ordered;
  ordered.reserve(tensors.size());
  for (const uint32_t at : order) {
    TensorInfo& tensor = tensors[at];
    if (!end.equals(begins[at])) {
      failure.offset = (CheckedSize(data_offset) + begins[at]).get();
      failure.field = quote_text(tensor.name) + ".data_offsets";
      failure.expected = fmt::format("from {}, where the data before ends", *end.get());
      failure.got = fmt::format("from {}", begins[at]);
      failure.hint = "tensors must neither overlap nor leave holes; save the file again";
      return failure;
    }
    end += tensor.nbytes;
    if (!end.at_most(data_bytes)) {
      failure.offset = (CheckedSize(data_offset) + begins[at]).get();
      failure.field = quote_text(tensor.name);
      failure.expected = fmt::format("within the {} bytes of data", data_bytes);
      failure.got = fmt::format("{} bytes from {}", tensor.nbytes, begins[at]);
      failure.hint = "the file is cut short: download or copy it again";
      return failure;
    }
    tensor.data = file->bytes().data() + data_offset + begins[at];
    tensor.file = file;
    ordered.push_back(std::move(tensor));
  }
  if (!end.equals(data_bytes)) {
    failure.offset = data_offset + *end.get();
    failure.field = "data";
    failure.expected = fmt::format("{} bytes, the sum of the tensors", *end.get());
    failure.got = std::to_string(data_bytes);
    return failure;
  }
  tensors = std::move(ordered);
  return {};
}

// The header's text, or why there is none.
Result<std::string_view> header_text(const MappedFile& file) {
  Failure failure;
  failure.path = file.path();
  failure.offset = 0;
  failure.field = "header length";
  if (file.size() < kPrefixBytes) {
    failure.expected = "8 bytes at the start of the file";
    failure.got = fmt::format("in a file of {} bytes", file.size());
    return failure;
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.bytes().data(), kPrefixBytes);
  if (header_bytes > kSafetensorsMaxHeaderBytes) {
    failure.expected = fmt::format("at most {}", kSafetensorsMaxHeaderBytes);
    failure.got = std::to_string(header_bytes);
    failure.hint = "is this a safetensors file?";
    return failure;
  }
  if (!(CheckedSize(header_bytes) + kPrefixBytes).at_most(file.size())) {
    failure.expected = fmt::format("at most the {} bytes that follow", file.size() - kPrefixBytes);
    failure.got = std::to_string(header_bytes);
    failure.hint = "the file is cut short: download or copy it again";
    return failure;
  }
  const std::string_view text(
      reinterpret_cast<const char*>(file.bytes().data()) + kPrefixBytes, header_bytes);
  failure.offset = kPrefixBytes;
  failure.field = "header";
  if (!text.starts_with('{')) {
    failure.expected = "a JSON object, starting with {";
    failure.got = quote_text(text, 16);
    return failure;
  }
  // The parser takes a NUL for the end of the text and would ignore what follows.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) {
    failure.offset = kPrefixBytes + nul;
    failure.expected = "valid JSON in UTF-8";
    failure.got = "a NUL byte";
    return failure;
  }
  return text;
}

}  // namespace

Result<SafetensorsFile> read_safetensors(const std::string& path) {
  auto file = MappedFile::open(path);
  if (!file) return std::move(file).error();
  return read_safetensors(std::move(*file));
}

Result<SafetensorsFile> read_safetensors(std::shared_ptr<const MappedFile> file) {
  const auto header = header_text(*file);
  if (!header) return header.error();
  SafetensorsFile result;
  {
    TrackedText text(*header);
    HeaderBuilder builder(file->path(), text, header->size());
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) {
      return std::move(builder.failure());
    }
    auto placed =
        place_tensors(builder.tensors(), builder.begins(), file, kPrefixBytes + header->size());
    if (!placed) return std::move(placed).error();
    result.tensors_ = std::move(builder.tensors());
    result.metadata_ = std::move(builder.metadata());
  }
  result.index_ = TensorIndex(result.tensors_);
  if (const auto duplicate = result.index_.duplicate(result.tensors_)) {
    return Failure{
        ErrorCode::invalid_input,
        file->path(),
        kPrefixBytes,
        quote_text(*duplicate),
        "a name that occurs once",
        "there twice",
        ""};
  }
  result.file_ = std::move(file);
  return result;
}

}  // namespace metal_lora::io
