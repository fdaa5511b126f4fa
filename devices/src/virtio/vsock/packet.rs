//! Packets of virtio-vsock: `struct virtio_vsock_hdr` (virtio 1.2 §5.10.6), which data may follow.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// Address of the host (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;
/// The only type of socket that is offered: `VIRTIO_VSOCK_TYPE_STREAM`.
pub const STREAM: u16 = 1;
/// In flags of [`Operation::Shutdown`]: its sender receives no more.
pub const RECEIVES_NO_MORE: u32 = 1;
/// In flags of [`Operation::Shutdown`]: its sender sends no more.
pub const SENDS_NO_MORE: u32 = 2;
/// Both.
pub const SHUT_DOWN: u32 = RECEIVES_NO_MORE | SENDS_NO_MORE;

/// What a packet is about (virtio 1.2 §5.10.6, `enum virtio_vsock_op`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Asks for a connection.
    Request,
    /// Agrees to it.
    Response,
    /// There is no connection, or no longer.
    Reset,
    /// Its sender receives or sends no more, as flags say.
    Shutdown,
    /// Data.
    Data,
    /// Nothing but the credit in the header.
    CreditUpdate,
    /// Asks for the credit.
    CreditRequest,
}

/// The two ends of a connection, by which it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// In the guest.
    pub guest: u32,
    /// At the host.
    pub host: u32,
}

/// The fields of a header. What a guest writes there may be anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub source_cid: u64,
    /// Address of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Type of the socket.
    pub kind: u16,
    /// Number of the [`Operation`].
    pub operation: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// Bytes the sender keeps for the connection.
    pub buffer: u32,
    /// Bytes it has given to its user so far, modulo 2³².
    pub forwarded: u32,
}

impl Operation {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    /// The number of the operation: 0 is none.
    pub fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

impl Header {
    /// The fields in `bytes`.
    pub fn read(bytes: &[u8; HEADER_LEN]) -> Self {
        let half = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let double = |at| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            source_cid: double(0),
            destination_cid: double(8),
            source_port: word(16),
            destination_port: word(20),
            len: word(24),
            kind: half(28),
            operation: half(30),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }

    /// The header as it lies in memory.
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = &mut bytes[..];
        let mut put = |field: &[u8]| {
            let (place, after) = std::mem::take(&mut rest).split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = after;
        };
        put(&self.source_cid.to_le_bytes());
        put(&self.destination_cid.to_le_bytes());
        put(&self.source_port.to_le_bytes());
        put(&self.destination_port.to_le_bytes());
        put(&self.len.to_le_bytes());
        put(&self.kind.to_le_bytes());
        put(&self.operation.to_le_bytes());
        put(&self.flags.to_le_bytes());
        put(&self.buffer.to_le_bytes());
        put(&self.forwarded.to_le_bytes());
        bytes
    }

    /// A packet of the host for the guest at address `cid`.
    pub fn to_guest(cid: u64, ports: Ports, operation: Operation) -> Self {
        Self {
            source_cid: HOST_CID,
            destination_cid: cid,
            source_port: ports.host,
            destination_port: ports.guest,
            kind: STREAM,
            operation: operation.number(),
            ..Self::default()
        }
    }

    /// The answer to a packet that is about no connection there can be: it goes back to where that came from.
    pub fn refusal(&self) -> Self {
        Self {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            kind: self.kind,
            operation: Operation::Reset.number(),
            ..Self::default()
        }
    }

    /// The connection that a packet of the guest is about.
    pub fn ports(&self) -> Ports {
        Ports {
            guest: self.source_port,
            host: self.destination_port,
        }
    }

    /// What a packet of the guest at address `cid` asks for; nothing that there is, if it is not for a stream to the host.
    pub fn operation(&self, cid: u64) -> Option<Operation> {
        let is_ours = self.source_cid == cid && self.destination_cid == HOST_CID && self.kind == STREAM;
        let mut known = Operation::ALL.into_iter().filter(|_| is_ours);
        known.find(|operation| operation.number() == self.operation)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_has_them() {
        let mut bytes = [0; HEADER_LEN];
        for (value, byte) in (0..).zip(&mut bytes) {
            *byte = value;
        }
        let header = Header::read(&bytes);
        assert_eq!(
            header,
            Header {
                source_cid: 0x0706_0504_0302_0100,
                destination_cid: 0x0f0e_0d0c_0b0a_0908,
                source_port: 0x1312_1110,
                destination_port: 0x1716_1514,
                len: 0x1b1a_1918,
                kind: 0x1d1c,
                operation: 0x1f1e,
                flags: 0x2322_2120,
                buffer: 0x2726_2524,
                forwarded: 0x2b2a_2928,
            }
        );
        assert_eq!(header.bytes(), bytes);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_and_written_alike(low: [u8; 32], high: [u8; 12]) {
            let mut bytes = [0; HEADER_LEN];
            bytes[..32].copy_from_slice(&low);
            bytes[32..].copy_from_slice(&high);
            prop_assert_eq!(Header::read(&bytes).bytes(), bytes);
        }
    }
}
