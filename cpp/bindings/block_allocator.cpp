// Bindings of the block allocator. Token and sequence ids come as any iterable of ints, or as int32 or int64 CPU tensors.
// SPDX-License-Identifier: Apache-2.0
#include "quire/block_allocator.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/scalar_args.h"
#include "bindings/tensor_args.h"
#include "core/check.h"

namespace quire::bindings {
namespace {

constexpr const char* kOp = "BlockAllocator";

// Integers from Python: borrowed from a contiguous tensor of T, else converted.
template <typename T>
class Integers {
 public:
  Integers(nb::handle object, const char* arg) {
    if (!PyList_CheckExact(object.ptr()) && nb::hasattr(object, "__dlpack__")) {
      from_tensor(object, arg);
    } else {
      from_iterable(object, arg);
    }
  }
  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;

  std::span<const T> span() const { return span_; }
  operator std::span<const T>() const { return span_; }

 private:
  static T checked(const Check& check, const char* arg, long long value, bool overflow) {
    if (overflow || value < std::numeric_limits<T>::min() || value > std::numeric_limits<T>::max()) {
      check.fail_value(arg, "integers of " + std::to_string(sizeof(T) * 8) + " bits",
                       overflow ? "an integer of more than 64 bits" : std::to_string(value));
    }
    return static_cast<T>(value);
  }

  void from_tensor(nb::handle object, const char* arg) {
    const Check check(kOp);
    args_.emplace(kOp, nb::none(), std::initializer_list<TensorArg>{{object, arg}});
    const TensorView& t = (*args_)[0];
    check.dtype(t, arg, {DType::kInt32, DType::kInt64});
    check.rank(t, arg, 1, 1);
    check.device(t, arg, Device{}, "the allocator");
    check.accessible(t, arg);
    const auto size = static_cast<std::size_t>(t.size(0));
    if (itemsize(t.dtype) == sizeof(T) && (t.stride(0) == 1 || size <= 1)) {
      span_ = {t.as<const T>(), size};
      return;
    }
    storage_.resize(size);
    for (std::size_t i = 0; i < size; ++i) {
      const auto at = static_cast<std::int64_t>(i) * t.stride(0);
      storage_[i] = checked(check, arg, t.dtype == DType::kInt32 ? t.as<const std::int32_t>()[at] : t.as<const std::int64_t>()[at], false);
    }
    span_ = storage_;
  }

  void from_iterable(nb::handle object, const char* arg) {
    const Check check(kOp);
    nb::object list = nb::borrow(object);
    if (!PyList_CheckExact(object.ptr())) {
      list = nb::steal(PySequence_List(object.ptr()));
      if (!list.is_valid()) {
        PyErr_Clear();
        check.fail_dtype(arg, "integers or an integer tensor", type_name(object));
      }
    }
    storage_.reserve(static_cast<std::size_t>(PyList_Size(list.ptr())));
    for (Py_ssize_t i = 0; i < PyList_Size(list.ptr()); ++i) {
      // Held, because the item's own __index__ may take it out of the list.
      const nb::object held = nb::borrow(PyList_GetItem(list.ptr(), i));
      PyObject* const item = held.ptr();
      int overflow = 0;
      long long value = 0;
      if (PyLong_CheckExact(item)) {
        value = PyLong_AsLongLongAndOverflow(item, &overflow);
      } else {
        const nb::object index = nb::steal(PyNumber_Index(item));
        if (!index.is_valid()) {
          PyErr_Clear();
          check.fail_dtype(arg, "integers", type_name(item));
        }
        value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
      }
      storage_.push_back(checked(check, arg, value, overflow != 0));
    }
    span_ = storage_;
  }

  static std::string type_name(nb::handle object) { return nb::cast<std::string>(object.type().attr("__name__")); }

  std::optional<Args> args_;
  std::vector<T> storage_;
  std::span<const T> span_;
};

std::string to_bytes(nb::handle object, const char* arg) {
  if (object.is_none()) return {};
  if (nb::isinstance<nb::bytes>(object)) {
    const auto bytes = nb::borrow<nb::bytes>(object);
    return {bytes.c_str(), bytes.size()};
  }
  if (!nb::isinstance<nb::str>(object)) Check(kOp).fail_dtype(arg, "str or bytes", nb::cast<std::string>(object.type().attr("__name__")));
  return nb::cast<std::string>(object);
}

std::vector<ExtraKey> to_extra_keys(nb::handle object) {
  std::vector<ExtraKey> keys;
  if (object.is_none()) return keys;
  const nb::object items = nb::steal(PySequence_List(object.ptr()));
  if (!items.is_valid()) {
    PyErr_Clear();
    Check(kOp).fail_dtype("extra_keys", "(token_idx, str or bytes) tuples", nb::cast<std::string>(nb::repr(object)));
  }
  for (const nb::handle item : nb::borrow<nb::list>(items)) {
    if (!nb::isinstance<nb::tuple>(item) || nb::len(item) != 2) {
      Check(kOp).fail_dtype("extra_keys", "(token_idx, str or bytes) tuples", nb::cast<std::string>(nb::repr(item)));
    }
    const auto pair = nb::borrow<nb::tuple>(item);
    keys.push_back({to_int(kOp, "extra_keys", pair[0]), to_bytes(pair[1], "extra_keys")});
  }
  return keys;
}

nb::object to_python(const BlockHash& hash) {
  static PyObject* const shift = PyLong_FromLong(64);
  const nb::object hi = nb::steal(PyLong_FromUnsignedLongLong(hash.hi));
  const nb::object lo = nb::steal(PyLong_FromUnsignedLongLong(hash.lo));
  const nb::object high = nb::steal(PyNumber_Lshift(hi.ptr(), shift));
  return nb::steal(PyNumber_Or(high.ptr(), lo.ptr()));
}

BlockHash to_hash(nb::handle object) {
  const nb::object mask = nb::steal(PyLong_FromUnsignedLongLong(std::numeric_limits<std::uint64_t>::max()));
  const nb::object value = nb::steal(PyNumber_Index(object.ptr()));
  if (!value.is_valid()) {
    PyErr_Clear();
    Check(kOp).fail_dtype("hash_key", "an int in [0, 2**128)", nb::cast<std::string>(object.type().attr("__name__")));
  }
  const nb::object lo = value & mask, hi = value >> nb::int_(64);
  BlockHash hash;
  hash.lo = PyLong_AsUnsignedLongLong(lo.ptr());
  hash.hi = PyLong_AsUnsignedLongLong(hi.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    Check(kOp).fail_value("hash_key", "an int in [0, 2**128)", nb::cast<std::string>(nb::repr(object)));
  }
  return hash;
}

nb::list to_python(const std::vector<BlockCopy>& copies) {
  nb::list list;
  for (const BlockCopy& copy : copies) list.append(nb::make_tuple(copy.src, copy.dst));
  return list;
}

// The caller's arrays of a batch, checked as far as the allocator cannot see: dtypes, shapes that agree, layout.
class Batch {
 public:
  Batch(nb::handle block_tables, nb::handle slot_mapping, nb::handle seq_lens, nb::handle query_start_loc, nb::handle positions)
      : args_(kOp, nb::none(),
              {{block_tables, kNames[0], Access::kWrite},
               {slot_mapping, kNames[1], Access::kWrite},
               {seq_lens, kNames[2], Access::kWrite},
               {query_start_loc, kNames[3], Access::kWrite},
               {positions, kNames[4], Access::kWrite, true}}) {
    const Check check(kOp);
    const TensorView& tables = args_[0];
    check.dtype(tables, kNames[0], {DType::kInt32});
    check.rank(tables, kNames[0], 2, 2);
    check.device(tables, kNames[0], Device{}, "the allocator");
    check.inner_contiguous(tables, kNames[0]);
    check.writable(tables, kNames[0]);
    const std::int64_t num_seqs = tables.size(0);
    check.rank(args_[1], kNames[1], 1, 1);
    const std::int64_t num_tokens = args_[1].size(0);
    check.vector(args_[1], kNames[1], DType::kInt64, num_tokens, Device{}, "the allocator");
    check.vector(args_[2], kNames[2], DType::kInt32, num_seqs, Device{}, "the allocator");
    check.vector(args_[3], kNames[3], DType::kInt32, num_seqs + 1, Device{}, "the allocator");
    const bool has_positions = args_.optional(4) != nullptr;
    if (has_positions) check.vector(args_[4], kNames[4], DType::kInt64, num_tokens, Device{}, "the allocator");
    for (std::size_t i = 0; i < (has_positions ? 5U : 4U); ++i) {
      if (i > 0) check.writable(args_[i], kNames[i]);
      for (std::size_t j = 0; j < i; ++j) check.disjoint(args_[i], kNames[i], args_[j], kNames[j], false);
    }
    view_.block_tables = tables.as<std::int32_t>();
    view_.block_tables_stride = num_seqs > 1 ? tables.stride(0) : tables.size(1);
    view_.max_blocks_per_seq = tables.size(1);
    view_.slot_mapping = args_[1].as<std::int64_t>();
    view_.max_tokens = num_tokens;
    view_.seq_lens = args_[2].as<std::int32_t>();
    view_.query_start_loc = args_[3].as<std::int32_t>();
    view_.max_seqs = num_seqs;
    view_.positions = has_positions ? args_[4].as<std::int64_t>() : nullptr;
  }

  const BatchView& view() const { return view_; }

 private:
  static constexpr const char* kNames[] = {"block_tables", "slot_mapping", "seq_lens", "query_start_loc", "positions"};
  Args args_;
  BatchView view_;
};

const char* kind_name(BlockEvent::Kind kind) {
  switch (kind) {
    case BlockEvent::Kind::kStored: return "stored";
    case BlockEvent::Kind::kRemoved: return "removed";
    case BlockEvent::Kind::kCleared: return "cleared";
    case BlockEvent::Kind::kLost: return "lost";
  }
  return "unknown";
}

void bind_records(nb::module_& m) {
  nb::class_<BlockAllocatorStats>(m, "BlockAllocatorStats",
                                  "Counts of a BlockAllocator at one moment. "
                                  "``num_live + num_cached + num_free == num_blocks``.")
      .def_ro("num_blocks", &BlockAllocatorStats::num_blocks, "Blocks of the device pool.")
      .def_ro("num_live", &BlockAllocatorStats::num_live, "Blocks that somebody holds.")
      .def_ro("num_cached", &BlockAllocatorStats::num_cached, "Blocks that nobody holds but that can be hit; evicted when needed.")
      .def_ro("num_free", &BlockAllocatorStats::num_free, "Blocks that hold nothing.")
      .def_ro("num_pinned", &BlockAllocatorStats::num_pinned, "Pinned blocks, a part of the live ones.")
      .def_ro("num_host_blocks", &BlockAllocatorStats::num_host_blocks, "Blocks of the host tier.")
      .def_ro("num_host_free", &BlockAllocatorStats::num_host_free, "Of these, those that hold nothing.")
      .def_ro("num_sequences", &BlockAllocatorStats::num_sequences, "Sequences, swapped out ones included.")
      .def_ro("num_lookup_tokens", &BlockAllocatorStats::num_lookup_tokens, "Tokens that the prefix cache was asked for, ever.")
      .def_ro("num_hit_tokens", &BlockAllocatorStats::num_hit_tokens, "Of these, found.")
      .def_ro("num_evictions", &BlockAllocatorStats::num_evictions, "Cached blocks given to somebody else, ever.")
      .def_ro("num_copies", &BlockAllocatorStats::num_copies, "Copies on write, ever.")
      .def("__repr__", [](const BlockAllocatorStats& s) {
        return "BlockAllocatorStats(num_blocks=" + std::to_string(s.num_blocks) + ", num_live=" + std::to_string(s.num_live) +
               ", num_cached=" + std::to_string(s.num_cached) + ", num_free=" + std::to_string(s.num_free) +
               ", num_pinned=" + std::to_string(s.num_pinned) + ", num_sequences=" + std::to_string(s.num_sequences) + ")";
      });

  nb::class_<SequenceInfo>(m, "SequenceInfo", "Counts of one sequence of a BlockAllocator at one moment.")
      .def_ro("num_tokens", &SequenceInfo::num_tokens, "Token ids known.")
      .def_ro("num_computed_tokens", &SequenceInfo::num_computed_tokens, "Tokens whose keys and values are in the cache.")
      .def_ro("num_reserved_tokens", &SequenceInfo::num_reserved_tokens, "Tokens that there is room for.")
      .def_ro("num_blocks", &SequenceInfo::num_blocks, "Entries of the block table, released ones included.")
      .def_ro("num_released_blocks", &SequenceInfo::num_released_blocks, "Leading entries that are -1.")
      .def_ro("is_swapped", &SequenceInfo::is_swapped, "Whether it is in the host tier.")
      .def_ro("is_cacheable", &SequenceInfo::is_cacheable, "False from reset_prefix_cache() until recomputed.")
      .def("__repr__", [](const SequenceInfo& s) {
        return "SequenceInfo(num_tokens=" + std::to_string(s.num_tokens) +
               ", num_computed_tokens=" + std::to_string(s.num_computed_tokens) +
               ", num_reserved_tokens=" + std::to_string(s.num_reserved_tokens) + ", num_blocks=" + std::to_string(s.num_blocks) + ")";
      });

  nb::class_<BlockEvent>(m, "BlockEvent", "A change of the prefix cache.")
      .def_prop_ro(
          "kind", [](const BlockEvent& e) { return kind_name(e.kind); }, nb::sig("def kind(self) -> str"),
          "\"stored\", \"removed\", \"cleared\", or \"lost\" where events were dropped because nobody took them in time.")
      .def_ro("block_id", &BlockEvent::block_id, "The block; -1 where the event is of none.")
      .def_prop_ro(
          "hash", [](const BlockEvent& e) { return to_python(e.hash); }, nb::sig("def hash(self) -> int"),
          "The 128-bit hash of the block and of everything before it.")
      .def_prop_ro(
          "parent_hash", [](const BlockEvent& e) { return to_python(e.parent_hash); }, nb::sig("def parent_hash(self) -> int"),
          "0 for the first block of a sequence.")
      .def_ro("token_ids", &BlockEvent::token_ids, "The tokens of a stored block.")
      .def("__repr__", [](const BlockEvent& e) {
        return std::string("BlockEvent(") + kind_name(e.kind) + ", block_id=" + std::to_string(e.block_id) + ")";
      });
}

// num_requested and num_available as attributes, besides the text.
void bind_error(nb::module_& m) {
  static PyObject* type = nullptr;
  nb::exception<OutOfBlocksError> error_type(m, "OutOfBlocksError", PyExc_MemoryError);
  error_type.attr("__doc__") = "Not enough free and cached blocks; nothing was allocated. Has ``num_requested`` and ``num_available``.";
  type = error_type.inc_ref().ptr();
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const OutOfBlocksError& error) {
      nb::object instance = nb::handle(type)(error.what());
      instance.attr("num_requested") = error.num_requested();
      instance.attr("num_available") = error.num_available();
      PyErr_SetObject(type, instance.ptr());
    }
  });
}

}  // namespace

#define QUIRE_BATCH_ARGS                                                                                                \
  nb::arg("seq_ids"), nb::arg("num_scheduled_tokens"), nb::kw_only(), nb::arg("block_tables"), nb::arg("slot_mapping"), \
      nb::arg("seq_lens"), nb::arg("query_start_loc"), nb::arg("positions").none() = nb::none()
#define QUIRE_BATCH_SIG                                                                                                           \
  "(self, seq_ids: collections.abc.Iterable[int], num_scheduled_tokens: collections.abc.Iterable[int], *, block_tables: object, " \
  "slot_mapping: object, "                                                                                                        \
  "seq_lens: object, query_start_loc: object, positions: object | None = None)"

void bind_block_allocator(nb::module_& m) {
  bind_error(m);
  bind_records(m);
  using A = BlockAllocator;
  using Ids = const Integers<SequenceId>;
  using Tokens = const Integers<TokenId>;

  nb::class_<A>(m, "BlockAllocator", nb::is_weak_referenceable(), R"doc(Who owns which block of a paged KV cache, and which can be reused.

It holds ids and counts, never tensors. Every block is live (somebody holds it), cached (nobody does, but its contents can be
hit; evicted when blocks run out, oldest first), or free. No null block is reserved: unused entries of a block table and unused
slots are -1, which every kernel skips. All methods may be called from any thread; one that raises has changed nothing.

A sequence's way through a step: ``add_sequence`` (takes over what the prefix cache has), ``grow_and_write_batch`` (blocks and
index arrays for the scheduled tokens), the model, ``commit_batch`` (what was computed can now be hit), ``append_tokens``.

Ids and counts may be given as any iterable of ints, or as int32 or int64 CPU tensors of any framework.

Args:
    num_blocks: Blocks of the device pool.
    block_size: Tokens per block, up to 65536.
    num_host_blocks: Blocks of the host tier, for ``swap_out``.
    watermark: Share of the blocks, in [0, 1), that ``keep_watermark=True`` keeps back.
    enable_prefix_cache: Whether freed blocks can be hit.
    enable_events: Whether ``take_events`` reports.
    max_events: Events kept until they are taken.
    hash_key: A 128-bit int; None draws one, so that nobody can construct collisions. A hit compares the tokens anyway.

Raises:
    ValueError: A value is out of range, a block is not held by the caller, a sequence is in the wrong state.
    IndexError: No such block or sequence.
    TypeError: A tensor has the wrong dtype, or an argument is not made of integers.
    OutOfBlocksError: A MemoryError, with ``num_requested`` and ``num_available``; nothing was allocated.

Example:
    >>> import quire
    >>> a = quire.BlockAllocator(num_blocks=8, block_size=4)
    >>> a.add_sequence(1, range(10))
    0
    >>> a.grow(1, 10)
    []
    >>> a.commit(1, 10)
    >>> a.block_table(1)
    [0, 1, 2]
    >>> a.add_sequence(2, range(10))
    8
)doc")
      .def(
          "__init__",
          [](A* self, std::int64_t num_blocks, std::int64_t block_size, std::int64_t num_host_blocks, double watermark,
             bool enable_prefix_cache, bool enable_events, std::int64_t max_events, nb::handle hash_key, bool constant_hash) {
            BlockAllocatorOptions options;
            options.num_blocks = num_blocks;
            options.block_size = block_size;
            options.num_host_blocks = num_host_blocks;
            options.watermark = watermark;
            options.enable_prefix_cache = enable_prefix_cache;
            options.enable_events = enable_events;
            options.max_events = max_events;
            if (!hash_key.is_none()) options.hash_key = to_hash(hash_key);
            if (constant_hash) {  // the worst hash there is, for tests
              options.hash_function = [](const BlockHash&, std::span<const TokenId>, std::span<const std::byte>) { return BlockHash{}; };
            }
            new (self) A(std::move(options));
          },
          nb::arg("num_blocks"), nb::arg("block_size") = 16, nb::kw_only(), nb::arg("num_host_blocks") = 0, nb::arg("watermark") = 0.01,
          nb::arg("enable_prefix_cache") = true, nb::arg("enable_events") = false, nb::arg("max_events") = 1 << 20,
          nb::arg("hash_key").none() = nb::none(), nb::arg("_constant_hash") = false,
          nb::sig("def __init__(self, num_blocks: int, block_size: int = 16, *, num_host_blocks: int = 0, watermark: float = 0.01, "
                  "enable_prefix_cache: bool = True, enable_events: bool = False, max_events: int = 1048576, "
                  "hash_key: int | None = None) -> None"))
      .def("__repr__",
           [](const A& a) {
             const BlockAllocatorStats s = a.stats();
             return "BlockAllocator(num_blocks=" + std::to_string(s.num_blocks) + ", block_size=" + std::to_string(a.block_size()) +
                    ", num_live=" + std::to_string(s.num_live) + ", num_cached=" + std::to_string(s.num_cached) +
                    ", num_free=" + std::to_string(s.num_free) + ")";
           })

      // Counts.
      .def_prop_ro("num_blocks", &A::num_blocks, "Blocks of the device pool.")
      .def_prop_ro("block_size", &A::block_size, "Tokens of a block.")
      .def_prop_ro("num_host_blocks", &A::num_host_blocks, "Blocks of the host tier.")
      .def_prop_ro("watermark_blocks", &A::watermark_blocks, "The blocks that ``keep_watermark`` keeps back.")
      .def("stats", &A::stats, "All counts, of one moment.")
      .def("usage", &A::usage, "The share of blocks that are live, in [0, 1].")
      .def("num_references", &A::num_references, nb::arg("block_id"), "References to a block, of all kinds.")

      // Raw blocks.
      .def("can_allocate", &A::can_allocate, nb::arg("num_blocks"), nb::kw_only(), nb::arg("keep_watermark") = false,
           "Whether this many blocks could be allocated now (and the watermark kept).")
      .def("allocate", nb::overload_cast<std::int64_t>(&A::allocate), nb::arg("num_blocks"),
           "Takes blocks, all or none: free ones first, then the oldest cached ones.")
      .def(
          "free", [](A& a, nb::handle ids) { a.free(Integers<BlockId>(ids, "block_ids")); }, nb::arg("block_ids"),
          nb::sig("def free(self, block_ids: collections.abc.Iterable[int]) -> None"),
          "Gives up one reference of ``allocate`` or ``ref`` per entry. A double free is a ValueError, and then none is freed.")
      .def(
          "ref", [](A& a, nb::handle ids) { a.ref(Integers<BlockId>(ids, "block_ids")); }, nb::arg("block_ids"),
          nb::sig("def ref(self, block_ids: collections.abc.Iterable[int]) -> None"),
          "Adds one reference per entry to live or cached blocks, to be given up by ``free``.")
      .def(
          "copy_on_write",
          [](A& a, BlockId id) {
            const BlockCopy c = a.copy_on_write(id);
            return nb::make_tuple(c.src, c.dst);
          },
          nb::arg("block_id"), nb::sig("def copy_on_write(self, block_id: int) -> tuple[int, int]"),
          "Makes a block that the caller holds writable. Returns (src, dst); if they differ, copy src to dst and use dst.")
      .def(
          "pin", [](A& a, nb::handle ids) { a.pin(Integers<BlockId>(ids, "block_ids")); }, nb::arg("block_ids"),
          nb::sig("def pin(self, block_ids: collections.abc.Iterable[int]) -> None"),
          "Keeps live or cached blocks from being evicted or written to.")
      .def(
          "unpin", [](A& a, nb::handle ids) { a.unpin(Integers<BlockId>(ids, "block_ids")); }, nb::arg("block_ids"),
          nb::sig("def unpin(self, block_ids: collections.abc.Iterable[int]) -> None"), "Undoes one ``pin`` per entry.")

      // Sequences.
      .def(
          "add_sequence",
          [](A& a, SequenceId id, nb::handle tokens, nb::handle salt, nb::handle keys) {
            return a.add_sequence(id, Tokens(tokens, "token_ids"), to_bytes(salt, "salt"), to_extra_keys(keys));
          },
          nb::arg("seq_id"), nb::arg("token_ids"), nb::kw_only(), nb::arg("salt").none() = nb::none(),
          nb::arg("extra_keys").none() = nb::none(),
          nb::sig("def add_sequence(self, seq_id: int, token_ids: collections.abc.Iterable[int], *, salt: str | bytes | None = None, "
                  "extra_keys: collections.abc.Iterable[tuple[int, str | bytes]] | None = None) -> int"),
          R"doc(Starts a sequence and takes over the cached blocks that hold its first tokens.

Args:
    seq_id: Any int of 64 bits that is not in use.
    token_ids: The tokens known so far.
    salt: Only sequences of the same salt share blocks.
    extra_keys: (token_idx, value): what else the contents depend on from that token on, such as an adapter or an image.

Returns:
    The number of tokens taken over as computed: whole blocks, and never the last token.
)doc")
      .def(
          "num_cached_tokens",
          [](const A& a, nb::handle tokens, nb::handle salt, nb::handle keys) {
            return a.num_cached_tokens(Tokens(tokens, "token_ids"), to_bytes(salt, "salt"), to_extra_keys(keys));
          },
          nb::arg("token_ids"), nb::kw_only(), nb::arg("salt").none() = nb::none(), nb::arg("extra_keys").none() = nb::none(),
          nb::sig("def num_cached_tokens(self, token_ids: collections.abc.Iterable[int], *, salt: str | bytes | None = None, "
                  "extra_keys: collections.abc.Iterable[tuple[int, str | bytes]] | None = None) -> int"),
          "What ``add_sequence`` would return, changing nothing.")
      .def("has_sequence", &A::has_sequence, nb::arg("seq_id"), "Whether there is such a sequence.")
      .def("__contains__", &A::has_sequence, nb::arg("seq_id"), "As ``has_sequence``.")
      .def(
          "__len__", [](const A& a) { return a.stats().num_sequences; }, "The number of sequences.")
      .def("sequence_ids", &A::sequence_ids, "In no particular order.")
      .def("sequence", &A::sequence, nb::arg("seq_id"), "The sequence's counts.")
      .def("token_ids", &A::token_ids, nb::arg("seq_id"), "The tokens known so far.")
      .def("block_table", &A::block_table, nb::arg("seq_id"), "Its device blocks, or its host blocks while it is swapped out.")
      .def("num_blocks_needed", &A::num_blocks_needed, nb::arg("seq_id"), nb::arg("num_new_tokens"),
           "Blocks that ``grow`` would take, copies included.")
      .def("can_grow", &A::can_grow, nb::arg("seq_id"), nb::arg("num_new_tokens"), nb::kw_only(), nb::arg("keep_watermark") = false,
           "Whether ``grow`` would succeed (and the watermark be kept).")
      .def(
          "grow", [](A& a, SequenceId id, std::int64_t n) { return to_python(a.grow(id, n)); }, nb::arg("seq_id"),
          nb::arg("num_new_tokens"), nb::sig("def grow(self, seq_id: int, num_new_tokens: int) -> list[tuple[int, int]]"),
          "Makes room for tokens after the computed ones. Returns (src, dst) blocks to copy before the sequence is written to.")
      .def(
          "append_tokens", [](A& a, SequenceId id, nb::handle tokens) { a.append_tokens(id, Tokens(tokens, "token_ids")); },
          nb::arg("seq_id"), nb::arg("token_ids"),
          nb::sig("def append_tokens(self, seq_id: int, token_ids: collections.abc.Iterable[int]) -> None"),
          "Appends token ids, before or after they are computed.")
      .def(
          "append_token_batch",
          [](A& a, nb::handle ids, nb::handle tokens) { a.append_token_batch(Ids(ids, "seq_ids"), Tokens(tokens, "token_ids")); },
          nb::arg("seq_ids"), nb::arg("token_ids"),
          nb::sig("def append_token_batch(self, seq_ids: collections.abc.Iterable[int], token_ids: collections.abc.Iterable[int]) -> None"),
          "Appends one token to each sequence.")
      .def("commit", &A::commit, nb::arg("seq_id"), nb::arg("num_tokens"),
           "The next tokens' keys and values are in the cache; blocks that became full can now be hit.")
      .def(
          "commit_batch",
          [](A& a, nb::handle ids, nb::handle counts) {
            a.commit_batch(Ids(ids, "seq_ids"), Integers<std::int64_t>(counts, "num_tokens"));
          },
          nb::arg("seq_ids"), nb::arg("num_tokens"),
          nb::sig("def commit_batch(self, seq_ids: collections.abc.Iterable[int], num_tokens: collections.abc.Iterable[int]) -> None"),
          "``commit`` of each sequence, all or nothing.")
      .def("truncate", &A::truncate, nb::arg("seq_id"), nb::arg("num_tokens"),
           "Forgets all but the first tokens, and gives up the blocks that only the others needed.")
      .def("fork", &A::fork, nb::arg("parent"), nb::arg("child"),
           "Starts ``child`` with the parent's tokens and computed blocks, shared until one of them writes.")
      .def("free_sequence", &A::free_sequence, nb::arg("seq_id"),
           "Ends a sequence. Its blocks become free, or cached with the tail to be evicted first.")
      .def("preempt", &A::preempt, nb::arg("seq_id"),
           "Gives up all blocks but keeps the tokens, to be recomputed. ``match_prefix`` takes back what is still cached by then.")
      .def("match_prefix", &A::match_prefix, nb::arg("seq_id"),
           "Asks the prefix cache again, for a sequence without blocks. Returns the number of tokens taken over.")
      .def("release_out_of_window", &A::release_out_of_window, nb::arg("seq_id"), nb::arg("window"),
           "Gives up the blocks that no query within ``window`` tokens can see. Returns how many; their entries become -1.")
      .def(
          "num_common_prefix_blocks", [](const A& a, nb::handle ids) { return a.num_common_prefix_blocks(Ids(ids, "seq_ids")); },
          nb::arg("seq_ids"), nb::sig("def num_common_prefix_blocks(self, seq_ids: collections.abc.Iterable[int]) -> int"),
          "How many leading blocks all of these sequences share.")

      // Host tier.
      .def("can_swap_out", &A::can_swap_out, nb::arg("seq_id"), "Whether the host tier has room for the sequence.")
      .def("can_swap_in", &A::can_swap_in, nb::arg("seq_id"), nb::kw_only(), nb::arg("keep_watermark") = false,
           "Whether ``swap_in`` would find its blocks (and the watermark be kept).")
      .def(
          "swap_out", [](A& a, SequenceId id) { return to_python(a.swap_out(id)); }, nb::arg("seq_id"),
          nb::sig("def swap_out(self, seq_id: int) -> list[tuple[int, int]]"),
          "Moves a sequence to the host tier. Returns (device, host) blocks; transfer them before the cache is written to again.")
      .def(
          "swap_in", [](A& a, SequenceId id) { return to_python(a.swap_in(id)); }, nb::arg("seq_id"),
          nb::sig("def swap_in(self, seq_id: int) -> list[tuple[int, int]]"),
          "Brings it back. Returns (host, device) blocks; those still in the prefix cache need no transfer.")

      // Batches.
      .def(
          "write_batch",
          [](A& a, nb::handle ids, nb::handle counts, nb::handle tables, nb::handle slots, nb::handle lens, nb::handle starts,
             nb::handle positions) {
            const Batch batch(tables, slots, lens, starts, positions);
            a.write_batch(Ids(ids, "seq_ids"), Integers<std::int64_t>(counts, "num_scheduled_tokens"), batch.view());
          },
          QUIRE_BATCH_ARGS, nb::sig("def write_batch" QUIRE_BATCH_SIG " -> None"),
          R"doc(Writes the index arrays of a batch, for sequences that ``grow`` made room for.

Dimensions: ``B`` rows for sequences, ``T`` tokens; both may be larger than the batch, and the rest is padding.

Args:
    seq_ids: The batch, in order; no sequence twice.
    num_scheduled_tokens: Tokens of each that are computed in this step.
    block_tables: int32 ``[B, max_blocks]``, unit inner stride; padded with -1.
    slot_mapping: int64 ``[T]``: block_id * block_size + offset of each token; padded with -1.
    seq_lens: int32 ``[B]``: computed and scheduled tokens; padded with 0.
    query_start_loc: int32 ``[B + 1]``: cumulative scheduled tokens; padded with the last value.
    positions: int64 ``[T]`` or None: each token's place in its sequence; padded with -1.

Raises:
    ValueError: The batch does not fit the arrays; nothing was written.
)doc")
      .def(
          "grow_and_write_batch",
          [](A& a, nb::handle ids, nb::handle counts, nb::handle tables, nb::handle slots, nb::handle lens, nb::handle starts,
             nb::handle positions) {
            const Batch batch(tables, slots, lens, starts, positions);
            return to_python(
                a.grow_and_write_batch(Ids(ids, "seq_ids"), Integers<std::int64_t>(counts, "num_scheduled_tokens"), batch.view()));
          },
          QUIRE_BATCH_ARGS, nb::sig("def grow_and_write_batch" QUIRE_BATCH_SIG " -> list[tuple[int, int]]"),
          "``grow`` of every sequence, all or nothing, and ``write_batch``. Returns (src, dst) blocks to copy before the model runs.")

      // Prefix cache.
      .def(
          "hash_blocks",
          [](const A& a, nb::handle tokens, nb::handle salt, nb::handle keys) {
            nb::list list;
            for (const BlockHash& hash : a.hash_blocks(Tokens(tokens, "token_ids"), to_bytes(salt, "salt"), to_extra_keys(keys))) {
              list.append(to_python(hash));
            }
            return list;
          },
          nb::arg("token_ids"), nb::kw_only(), nb::arg("salt").none() = nb::none(), nb::arg("extra_keys").none() = nb::none(),
          nb::sig("def hash_blocks(self, token_ids: collections.abc.Iterable[int], *, salt: str | bytes | None = None, "
                  "extra_keys: collections.abc.Iterable[tuple[int, str | bytes]] | None = None) -> list[int]"),
          "The 128-bit hashes of the full blocks of these tokens, as they appear in events.")
      .def("reset_prefix_cache", &A::reset_prefix_cache,
           "Forgets all cached contents, as after a change of weights. What running sequences have computed never becomes a hit.")
      .def("take_events", &A::take_events, "The events since the last call, oldest first.")
      .def("check", &A::check, "Proves every invariant, or raises RuntimeError.");
}

}  // namespace quire::bindings
