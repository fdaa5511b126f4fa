//! What devices have done since the VM was built, in numbers.
//!
//! A device adds to atomic counters that it shares with whoever asks; neither waits for the other. A set of numbers is
//! therefore not of one instant: a request may be among the reads and its bytes not yet among the bytes read.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    (
        $(#[$doc:meta])* $stats:ident, $counters:ident ($($(#[$key_doc:meta])* $key:ident: $key_type:ty)?)
        { $($(#[$field_doc:meta])* $field:ident,)* }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct $stats {
            $($(#[$key_doc])* pub $key: $key_type,)?
            $($(#[$field_doc])* pub $field: u64,)*
        }

        /// Where a device counts.
        #[derive(Debug, Default)]
        pub struct $counters {
            $(pub(crate) $field: Counter,)*
        }

        impl $counters {
            /// The numbers as they are now.
            pub fn read(&self $(, $key: $key_type)?) -> $stats {
                $stats { $($key,)? $($field: self.$field.get(),)* }
            }
        }
    };
}

counters! {
    /// A disk. Requests are counted when they are answered.
    DiskStats, DiskCounters (
        /// Which disk.
        id: String
    ) {
        /// Read requests that succeeded.
        reads,
        /// Write requests that succeeded.
        writes,
        /// Flushes that succeeded.
        flushes,
        /// Discards and write-zeroes requests that succeeded.
        discards,
        /// Bytes given to the guest.
        read_bytes,
        /// Bytes taken from the guest.
        written_bytes,
        /// Requests of any kind that failed, or that this disk does not know.
        failed,
        /// Times the rate limiter made the queue wait.
        throttled,
    }
}

counters! {
    /// A network interface. Bytes are those of Ethernet frames, without the header that virtio puts before them. What it
    /// carries between the guest and the metadata service is not among them.
    NetStats, NetCounters (
        /// Which interface.
        id: String
    ) {
        /// Frames given to the guest.
        rx_frames,
        /// Bytes of these.
        rx_bytes,
        /// Times the rate limiter left frames for the guest on the host.
        rx_throttled,
        /// Frames of the guest that left, or will once their checkpoint is permanent.
        tx_frames,
        /// Bytes of these.
        tx_bytes,
        /// Frames of the guest that were no frames, or that the host did not want.
        tx_dropped,
        /// Times the rate limiter made frames of the guest wait.
        tx_throttled,
    }
}

counters! {
    /// The entropy device.
    RngStats, RngCounters () {
        /// Requests answered.
        requests,
        /// Random bytes given to the guest.
        bytes,
        /// Times the rate limiter made the guest wait.
        throttled,
    }
}

counters! {
    /// The socket device.
    VsockStats, VsockCounters () {
        /// Packets given to the guest, of all kinds.
        rx_packets,
        /// Bytes of data in these.
        rx_bytes,
        /// Packets taken from the guest, of all kinds.
        tx_packets,
        /// Bytes of data in these.
        tx_bytes,
        /// Connections to which both ends agreed.
        opened,
        /// Of these, those that are over.
        closed,
        /// Connections that one end asked for and the other did not agree to, and clients of the host that asked for nothing
        /// that there is.
        refused,
    }
}

counters! {
    /// The metadata service, at all interfaces of the VM.
    MmdsStats, MmdsCounters () {
        /// Frames of the guest for the service.
        rx_frames,
        /// Of these, those that it has no use for, or no room.
        rx_dropped,
        /// Frames given to the guest.
        tx_frames,
        /// Connections of the guest.
        opened,
        /// Of these, those that are over.
        closed,
        /// Requests answered, in whatever way.
        requests,
        /// Requests for metadata without a token.
        no_token,
        /// Requests for metadata with a token that is not good.
        invalid_token,
    }
}

counters! {
    /// The balloon.
    BalloonCounts, BalloonCounters () {
        /// Lists of pages that the guest put into the balloon.
        inflated,
        /// Lists of pages that it took out of it.
        deflated,
        /// Times it told how it uses its memory.
        statistics,
        /// Lists of free pages that it reported.
        reported,
        /// Bytes of these.
        reported_bytes,
        /// Bytes of memory that the host got, from the balloon or as free pages.
        reclaimed_bytes,
    }
}

counters! {
    /// The serial port.
    SerialStats, SerialCounters () {
        /// Bytes the guest wrote.
        output_bytes,
        /// Bytes the guest read.
        input_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_read_under_its_name() {
        let counters = DiskCounters::default();
        counters.reads.add(1);
        counters.read_bytes.add(4096);
        counters.reads.add(1);
        assert_eq!(
            counters.read("rootfs".to_owned()),
            DiskStats {
                id: "rootfs".to_owned(),
                reads: 2,
                read_bytes: 4096,
                ..DiskStats::default()
            }
        );
    }
}
