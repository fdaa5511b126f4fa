//! Flow control of a connection (virtio 1.2 §5.10.6.3): neither end sends what the other has no room for.
//!
//! Each end tells how many bytes it can keep, and how many it has passed on so far; what was sent and not passed on yet
//! takes room. The counters are modulo 2³².
//!
//! ```text
//!   sender's room = buffer − (sent − forwarded)          as of the last header the receiver has sent
//! ```

/// Bytes that are kept of what a guest sent over one connection and the host has not taken yet.
pub const BUFFER: u32 = 128 << 10;
/// The guest is told of room again when it does not know of so much of it.
const UNTOLD_MAX: u32 = BUFFER / 2;

/// The credit of both ends of one connection.
#[derive(Clone, Debug)]
pub struct Credit {
    /// Bytes of the guest's that the host has taken, or never will.
    forwarded: u32,
    /// What the guest was told of these.
    told: u32,
    /// Whether the guest has asked to be told.
    is_asked: bool,
    /// Bytes sent to the guest.
    sent: u32,
    /// What it keeps.
    guest_buffer: u32,
    /// What it has passed on.
    guest_forwarded: u32,
    /// Whether it has been asked for room since it last told of some.
    has_asked: bool,
}

impl Credit {
    /// That of a new connection: the guest has not told of any room yet.
    pub fn new() -> Self {
        Self {
            forwarded: 0,
            told: 0,
            is_asked: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            has_asked: false,
        }
    }

    /// The guest says that it keeps `buffer` bytes and has passed on `forwarded`.
    pub fn learn(&mut self, buffer: u32, forwarded: u32) {
        (self.guest_buffer, self.guest_forwarded) = (buffer, forwarded);
        self.has_asked &= self.room() == 0;
    }

    /// Bytes that may be sent to the guest. None if its numbers make no sense.
    pub fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// So many bytes, for which there was room, are sent to the guest.
    pub fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// The host has taken so many bytes of the guest's.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The guest wants to be told.
    pub fn ask(&mut self) {
        self.is_asked = true;
    }

    /// Whether the guest should be told, even if there is nothing else for it.
    pub fn update_is_due(&self) -> bool {
        self.is_asked || self.forwarded.wrapping_sub(self.told) >= UNTOLD_MAX
    }

    /// What the next header says: bytes that are kept, and bytes that were passed on.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        self.is_asked = false;
        (BUFFER, self.forwarded)
    }

    /// Whether to ask the guest for room.
    pub fn request_is_due(&self) -> bool {
        self.room() == 0 && !self.has_asked
    }

    /// It is asked.
    pub fn request(&mut self) {
        self.has_asked = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What happens to a connection.
    #[derive(Clone, Debug)]
    enum Step {
        /// The guest sends as much of this as it may.
        GuestSends(u32),
        /// The host takes as much of this as there is.
        HostTakes(u32),
        /// The host sends as much of this as it may.
        HostSends(u32),
        /// The guest's program takes as much of this as there is, and the guest tells.
        GuestTakes(u32),
        /// The guest is told, whether that is due or not.
        Tell,
    }

    fn step() -> impl Strategy<Value = Step> {
        let bytes = prop_oneof![0..100_u32, 0..BUFFER * 2];
        prop_oneof![
            bytes.clone().prop_map(Step::GuestSends),
            bytes.clone().prop_map(Step::HostTakes),
            bytes.clone().prop_map(Step::HostSends),
            bytes.prop_map(Step::GuestTakes),
            Just(Step::Tell),
        ]
    }

    /// A connection as it is: queues of bytes, counted without any wrapping.
    #[derive(Default)]
    struct Reference {
        /// Sent by the guest, taken by the host.
        guest: (u64, u64),
        /// What the guest was told that the host has taken.
        told: u64,
        /// Sent by the host, taken by the guest.
        host: (u64, u64),
    }

    proptest! {
        #[test]
        fn no_end_sends_what_the_other_has_no_room_for_and_all_that_there_is_can_be_used(
            start: u32, guest_buffer in 1..BUFFER * 2, steps in prop::collection::vec(step(), 1..200),
        ) {
            let mut credit = Credit::new();
            // Counters that are about to wrap are as good as any.
            (credit.forwarded, credit.told, credit.sent) = (start, start, start);
            credit.learn(guest_buffer, start);
            let mut is = Reference::default();
            for step in steps {
                match step {
                    Step::GuestSends(bytes) => {
                        let known = u64::from(BUFFER) - (is.guest.0 - is.told);
                        is.guest.0 += u64::from(bytes).min(known);
                        prop_assert!(is.guest.0 - is.guest.1 <= u64::from(BUFFER));
                    }
                    Step::HostTakes(bytes) => {
                        let taken = u64::from(bytes).min(is.guest.0 - is.guest.1);
                        is.guest.1 += taken;
                        credit.forward(u32::try_from(taken).unwrap());
                    }
                    Step::HostSends(bytes) => {
                        prop_assert_eq!(u64::from(credit.room()), u64::from(guest_buffer) - (is.host.0 - is.host.1));
                        let sent = bytes.min(credit.room());
                        is.host.0 += u64::from(sent);
                        credit.send(sent);
                    }
                    Step::GuestTakes(bytes) => {
                        is.host.1 += u64::from(bytes).min(is.host.0 - is.host.1);
                        let taken = u32::try_from(is.host.1 % (1 << 32)).unwrap();
                        credit.learn(guest_buffer, start.wrapping_add(taken));
                    }
                    Step::Tell => {}
                }
                if matches!(step, Step::Tell) || credit.update_is_due() {
                    let (buffer, forwarded) = credit.tell();
                    prop_assert_eq!(buffer, BUFFER);
                    is.told = is.guest.1;
                    let told = u32::try_from(is.told % (1 << 32)).unwrap();
                    prop_assert_eq!(forwarded, start.wrapping_add(told));
                }
                // A guest whose bytes are all taken knows of room.
                prop_assert!(is.guest.0 > is.guest.1 || is.guest.0 - is.told < u64::from(BUFFER));
            }
        }

        #[test]
        fn a_guest_that_lies_about_what_it_has_passed_on_gets_no_more_than_it_says_it_keeps(
            sent: u32, buffer: u32, forwarded: u32,
        ) {
            let mut credit = Credit::new();
            credit.send(sent);
            credit.learn(buffer, forwarded);
            prop_assert!(credit.room() <= buffer);
        }
    }

    #[test]
    fn a_guest_without_room_is_asked_once_until_it_tells_of_some() {
        let mut credit = Credit::new();
        assert!(credit.request_is_due());
        credit.request();
        assert!(!credit.request_is_due());
        credit.learn(0, 0);
        assert!(!credit.request_is_due());
        credit.learn(1, 0);
        assert!(!credit.request_is_due());
        credit.send(1);
        assert!(credit.request_is_due());
    }
}
