// Layout of tiles in shared memory as TMA writes them and wgmma reads them: rows of 64 or 128 bytes
// whose 16-byte chunks are permuted, and the descriptors of such tiles. No CUDA in here: the host
// model of tests/cuda_emulator decodes the same numbers.
//
// A tile wider than 128 bytes is several panels of 128-byte rows, one after the other. Tiles start
// at multiples of 1024 bytes, so that the permutation depends on the offset alone.
// PTX ISA, "Shared Memory Matrix Layout", "Matrix Descriptor", "Swizzling Modes".
#pragma once

#include "../../common/hopper_tiles.h"

namespace fastenc::cuda::sm90 {

constexpr int kSwizzleAtomRows = 8;

// Byte offset within a panel -> where it lies: bits 7.. (the row) are added into bits 4.. (the
// chunk) without carry; three bits for 128-byte rows, two for 64-byte rows.
template <int kRowBytes>
FASTENC_HD constexpr uint32_t swizzled(uint32_t offset) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return offset ^ ((offset >> 7 & (kRowBytes / 16 - 1)) << 4);
}

// `rows` rows of kHeadDim 16-bit elements.
template <int kHeadDim, int kRows>
struct Tile {
  static constexpr int kRowBytes = kHeadDim * 2 < 128 ? kHeadDim * 2 : 128;
  static constexpr int kPanels = kHeadDim * 2 / kRowBytes;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, in a row
  static constexpr int kRowCount = kRows;
  static constexpr int kBoxBytes = kBoxRows * kHeadDim * 2;  // all panels

  // Of the 16 bytes that hold elements 8 chunk .. 8 chunk + 7 of a row.
  static FASTENC_HD constexpr uint32_t chunk_offset(int row, int chunk) {
    constexpr int kInRow = kRowBytes / 16;
    return chunk / kInRow * kPanelBytes +
           swizzled<kRowBytes>(row * kRowBytes + chunk % kInRow * 16);
  }

  // Start addresses are in units of 16 bytes (bits 0-13), as are the leading (16-29) and the stride
  // offset (32-45); bits 62-63 are the swizzle: 1 for 128 bytes, 2 for 64. The base offset (49-51)
  // is 0: every repeating pattern starts at a multiple of its size.
  static FASTENC_HD constexpr uint64_t descriptor(uint32_t address, uint32_t leading) {
    constexpr uint64_t kMode = kRowBytes == 128 ? 1 : 2;
    constexpr uint64_t kStride = kSwizzleAtomRows * kRowBytes >> 4;
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
           kStride << 32 | kMode << 62;
  }

  // Rows are M or N, the 16 elements of step k along a row are K. The leading offset is not used
  // where the rows are swizzled; 1 by convention.
  static FASTENC_HD constexpr uint64_t along_rows(uint32_t tile, int first_row, int k) {
    const int byte = k * 32;
    return descriptor(
        tile + byte / kRowBytes * kPanelBytes + first_row * kRowBytes + byte % kRowBytes, 16);
  }

  // Rows are K, 16 of them from first_row on, and the elements of a row are M or N from `column`
  // (a multiple of a panel's) on (imm-trans = 1). The leading offset leads to the next panel.
  static FASTENC_HD constexpr uint64_t across_rows(uint32_t tile, int first_row, int column = 0) {
    return descriptor(tile + column * 2 / kRowBytes * kPanelBytes + first_row * kRowBytes,
                      kPanelBytes);
  }
};

}  // namespace fastenc::cuda::sm90
