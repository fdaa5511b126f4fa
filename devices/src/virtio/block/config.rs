//! The block device's configuration space (virtio 1.2 §5.2.4).

use virtio_bindings::virtio_blk::virtio_blk_config;
use vm_memory::ByteValued;

use super::disk::SECTOR_SIZE;

/// Most sectors of one discard or write-zeroes request: 2 GiB.
pub const CLEAR_SECTORS_MAX: u32 = 1 << 22;
/// `log2` of the sectors in a page of the host's cache, to which drivers align what they write where they can.
const PAGE_SECTORS_LOG2: u8 = 3;

/// [`virtio_blk_config`] as the bytes a driver reads.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Config(virtio_blk_config);

// SAFETY: the structure is packed integers, any bytes of which are valid.
unsafe impl ByteValued for Config {}

/// What a driver reads about a disk of `sectors` 512-byte sectors behind a queue of `queue_size` descriptors.
pub fn bytes(sectors: u64, queue_size: u16) -> Vec<u8> {
    let config = Config(virtio_blk_config {
        capacity: sectors.to_le(),
        // All of a queue's descriptors but those of the header and the status.
        seg_max: u32::from(queue_size - 2).to_le(),
        blk_size: SECTOR_SIZE.to_le(),
        physical_block_exp: PAGE_SECTORS_LOG2,
        max_discard_sectors: CLEAR_SECTORS_MAX.to_le(),
        max_discard_seg: 1_u32.to_le(),
        discard_sector_alignment: (1_u32 << PAGE_SECTORS_LOG2).to_le(),
        max_write_zeroes_sectors: CLEAR_SECTORS_MAX.to_le(),
        max_write_zeroes_seg: 1_u32.to_le(),
        write_zeroes_may_unmap: 1,
        ..Default::default()
    });
    config.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_where_the_specification_puts_them() {
        let bytes = bytes(0x0102_0304_0506, 256);
        let u32_at = |offset: usize| u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap());
        assert_eq!(bytes[..8], [6, 5, 4, 3, 2, 1, 0, 0]);
        assert_eq!((u32_at(12), u32_at(20), bytes[24]), (254, 512, 3));
        assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 1, 8));
        assert_eq!((u32_at(48), u32_at(52), bytes[56]), (1 << 22, 1, 1));
    }
}
