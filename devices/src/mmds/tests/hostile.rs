//! Property: whatever frames a guest sends, the service neither panics nor hangs, keeps to its bounds, and serves the next
//! who asks.

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use super::*;

/// What a guest does.
#[derive(Clone, Debug)]
enum Step {
    /// Sends a segment, from where its peer is or thereabouts.
    Segment {
        port: u16,
        to: u16,
        flags: u16,
        sequence: i32,
        acknowledged: i32,
        window: u16,
        payload: Vec<u8>,
    },
    /// Sends a good frame with some bytes changed and cut off.
    Damaged(Vec<(usize, u8)>, usize),
    /// Sends bytes.
    Bytes(Vec<u8>),
    /// Takes frames.
    Take(usize),
    /// Lets time pass, in milliseconds.
    Wait(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let payload = prop_oneof![
        Just(Vec::new()),
        Just(b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        Just(b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 1\r\n\r\n".to_vec()),
        prop::collection::vec(any::<u8>(), 0..3000),
    ];
    let near = || prop_oneof![6 => Just(0), 2 => -2..3_i32, 1 => any::<i32>()];
    // FIN, SYN, RST, PSH, ACK.
    let flags = prop_oneof![4 => Just(0x10_u16), 3 => Just(0x02), 1 => Just(0x11), 1 => Just(0x04), 2 => 0..64_u16];
    let window = prop_oneof![3 => Just(u16::MAX), 1 => any::<u16>()];
    let to = prop_oneof![9 => Just(80_u16), 1 => any::<u16>()];
    let segment = (1000..1003_u16, to, flags, near(), near(), window, payload).prop_map(
        |(port, to, flags, sequence, acknowledged, window, payload)| Step::Segment {
            port,
            to,
            flags,
            sequence,
            acknowledged,
            window,
            payload,
        },
    );
    let damages = prop::collection::vec((0..80_usize, any::<u8>()), 1..5);
    prop_oneof![
        12 => segment,
        3 => (damages, 0..80_usize).prop_map(|(damages, cut)| Step::Damaged(damages, cut)),
        1 => prop::collection::vec(any::<u8>(), 0..200).prop_map(Step::Bytes),
        6 => (0..100_usize).prop_map(Step::Take),
        1 => (0..40_000_u64).prop_map(Step::Wait),
    ]
}

/// A frame with a segment, of which only the flags are not as they should be.
fn segment(port: u16, to: u16, flags: u16, [sequence, acknowledged]: [i32; 2], window: u16, payload: &[u8]) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: port,
        dst_port: to,
        control: TcpControl::None,
        seq_number: TcpSeqNumber(sequence),
        ack_number: Some(TcpSeqNumber(acknowledged)),
        window_len: window,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let ip = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: mmds_address(),
        next_header: IpProtocol::Tcp,
        payload_len: tcp.buffer_len(),
        hop_limit: 64,
    };
    let mut frame = vec![0; 14 + ip.buffer_len() + tcp.buffer_len()];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
    ethernet.set_src_addr(GUEST_MAC);
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let sums = ChecksumCapabilities::ignored();
    let mut packet = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    ip.emit(&mut packet, &sums);
    let mut tcp_packet = TcpPacket::new_unchecked(packet.payload_mut());
    tcp.emit(&mut tcp_packet, &GUEST.into(), &mmds_address().into(), &sums);
    // The flags are the last byte but one bit of these two (RFC 9293 §3.1).
    let offset_and_flags = 14 + ip.buffer_len() + 12;
    frame[offset_and_flags + 1] = flags.to_le_bytes()[0];
    frame
}

/// Where the service is, in its last segment to one of the guest's ports: what it expects and what comes after it.
fn position(frame: &[u8]) -> Option<[i32; 2]> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    let tcp = TcpPacket::new_checked(packet.payload()).ok()?;
    let len = i32::try_from(tcp.segment_len()).ok()?;
    Some([tcp.ack_number().0, tcp.seq_number().0.wrapping_add(len)])
}

fn send(endpoint: &mut Endpoint, frame: Vec<u8>) {
    if frame.first_chunk().is_some_and(|beginning| endpoint.claims(beginning)) {
        endpoint.take(frame);
    }
}

#[test]
fn no_sequence_of_frames_does_harm() {
    proptest!(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() },
        |(steps in prop::collection::vec(any_step(), 0..120))| {
        let mut endpoint = endpoint(MmdsVersion::V1);
        // It has to know the guest to answer it.
        let mut client = Client::new();
        client.request(&mut endpoint, "GET / HTTP/1.1\r\n\r\n");
        let mut last = [0_i32, 0];
        for step in steps {
            match step {
                Step::Segment { port, to, flags, sequence, acknowledged, window, payload } => {
                    let numbers = [last[0].wrapping_add(sequence), last[1].wrapping_add(acknowledged)];
                    send(&mut endpoint, segment(port, to, flags, numbers, window, &payload));
                }
                Step::Damaged(damages, cut) => {
                    let mut frame = segment(1000, 80, 2, last, 1000, b"GET / HTTP/1.1\r\n\r\n");
                    for (at, value) in damages {
                        if let Some(byte) = frame.get_mut(at) {
                            *byte = value;
                        }
                    }
                    frame.truncate(frame.len() - cut.min(frame.len()));
                    send(&mut endpoint, frame);
                }
                // Not asked whether it is for the service.
                Step::Bytes(bytes) => endpoint.take(bytes),
                Step::Take(count) => {
                    for _ in 0..count {
                        let Some(frame) = endpoint.next_frame() else { break };
                        last = position(&frame[HEADROOM..]).unwrap_or(last);
                    }
                }
                Step::Wait(millis) => {
                    endpoint.let_pass(time::Duration::from_millis(millis));
                    endpoint.go_on();
                }
            }
            prop_assert!(endpoint.connections() <= 30);
        }
        endpoint.let_pass(time::Duration::from_secs(31));
        let mut waiting = 0;
        while endpoint.next_frame().is_some() {
            waiting += 1;
        }
        prop_assert!(waiting <= 64 + 30, "{waiting} frames were waiting");
        endpoint.go_on();
        while endpoint.next_frame().is_some() {}
        prop_assert_eq!(endpoint.connections(), 0);
        prop_assert_eq!(get(&mut endpoint, "/", ""), ok("latest/"));
    });
}
