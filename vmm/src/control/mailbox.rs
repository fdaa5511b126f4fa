//! What waits for the state driver: commands of those outside, and the end of the guest.
//!
//! The end has a place of its own, in which only the first one counts: a guest cannot fill anything by ending itself
//! over and over, and neither does it wait behind commands. Nor do the steps of operations that are under way, of which
//! there are few. Commands are bounded by [`COMMANDS_MAX`].

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Command;
use crate::lifecycle::{GuestEnd, Refusal};
use crate::{migration, protection, snapshot};

/// Most commands that wait for the state driver.
pub const COMMANDS_MAX: usize = 64;

/// What the state driver has to deal with next.
pub enum Message {
    /// The guest can go no further.
    Ended(Ending),
    /// An operation that is under way wants something, or is over.
    Job(JobStep),
    /// Somebody outside wants something.
    Command(Command),
    /// Nothing came until the deadline.
    DeadlinePassed,
}

/// How far an operation has come that is under way. There is one of each kind at a time, which waits for an answer after
/// each step but the last.
pub enum JobStep {
    /// The snapshot that is being made.
    Snapshot(snapshot::Step),
    /// The migration that is under way.
    Migration(migration::Step),
    /// The standby that was brought up to date. Nobody waits for an answer.
    Protection(protection::SeedingDone),
}

/// Why the guest can go no further.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// Its own doing.
    Guest(GuestEnd),
    /// KVM cannot go on running it.
    VcpuFailed {
        /// Which vCPU.
        cpu: u8,
        /// What KVM said.
        reason: String,
    },
}

/// The one way to the state driver.
#[derive(Default)]
pub struct Mailbox {
    content: Mutex<Content>,
    filled: Condvar,
}

#[derive(Default)]
struct Content {
    ending: Option<Ending>,
    steps: VecDeque<JobStep>,
    commands: VecDeque<Command>,
    closed: bool,
}

impl Mailbox {
    /// Leaves a command to be answered by the state driver. If it cannot be, it is refused at once.
    pub fn submit(&self, command: Command) {
        let refusal = {
            let mut content = self.lock();
            if content.closed {
                Refusal::Ended
            } else if content.commands.len() == COMMANDS_MAX {
                Refusal::TooManyRequests
            } else {
                content.commands.push_back(command);
                self.filled.notify_one();
                return;
            }
        };
        command.refuse(refusal);
    }

    /// Reports that the guest can go no further. Never waits.
    pub fn report(&self, ending: Ending) {
        let mut content = self.lock();
        if content.ending.is_none() {
            content.ending = Some(ending);
            self.filled.notify_one();
        }
    }

    /// Reports how far an operation has come that is under way. Never waits.
    pub fn step(&self, step: JobStep) {
        self.lock().steps.push_back(step);
        self.filled.notify_one();
    }

    /// Takes out what an operation has reported, whose steps are those that `are_its`.
    pub fn take_step(&self, are_its: fn(&JobStep) -> bool) -> Option<JobStep> {
        let steps = &mut self.lock().steps;
        let at = steps.iter().position(are_its)?;
        steps.remove(at)
    }

    /// Whether the guest can go no further, which the state driver has yet to learn.
    pub fn has_ending(&self) -> bool {
        self.lock().ending.is_some()
    }

    /// Forgets the end of a guest that has been torn down, of which nobody can report any more.
    pub fn forget_ending(&self) {
        self.lock().ending = None;
    }

    /// Waits for the next message, for ever or until `deadline`.
    pub fn receive(&self, deadline: Option<Instant>) -> Message {
        let mut content = self.lock();
        loop {
            if let Some(ending) = content.ending.take() {
                return Message::Ended(ending);
            }
            if let Some(step) = content.steps.pop_front() {
                return Message::Job(step);
            }
            // Commands that keep coming do not put the deadline off.
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Message::DeadlinePassed;
            }
            if let Some(command) = content.commands.pop_front() {
                return Message::Command(command);
            }
            content = match left {
                None => self.filled.wait(content).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.filled.wait_timeout(content, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Refuses what still waits and all that is to come: nobody receives any more.
    pub fn close(&self) {
        let left = {
            let mut content = self.lock();
            content.closed = true;
            std::mem::take(&mut content.commands)
        };
        for command in left {
            command.refuse(Refusal::Ended);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread;

    use super::*;
    use crate::Error;
    use crate::control::Reply;
    use crate::lifecycle::{Request, State};

    type Answers = Receiver<Result<(), Error>>;

    fn pause() -> (Command, Answers) {
        let (answer, answers) = channel();
        let reply = Reply::new(move |result| answer.send(result).expect("the test listens"));
        (Command::Lifecycle(Request::Pause, reply), answers)
    }

    fn refusal(answers: &Answers) -> Refusal {
        match answers.recv().expect("every command is answered") {
            Err(Error::Refused(refusal)) => refusal,
            other => panic!("not refused: {other:?}"),
        }
    }

    fn is_command(message: &Message) -> bool {
        matches!(message, Message::Command(Command::Lifecycle(Request::Pause, _)))
    }

    #[test]
    fn commands_beyond_the_limit_are_refused_and_the_others_kept() {
        let mailbox = Mailbox::default();
        let kept: Vec<Answers> = (0..COMMANDS_MAX)
            .map(|_| {
                let (command, answers) = pause();
                mailbox.submit(command);
                answers
            })
            .collect();
        let (command, answers) = pause();
        mailbox.submit(command);
        assert_eq!(refusal(&answers), Refusal::TooManyRequests);
        for answers in kept {
            let Message::Command(Command::Lifecycle(_, reply)) = mailbox.receive(None) else {
                panic!("a command went missing");
            };
            reply.send(Ok(()));
            assert!(answers.recv().expect("an answer").is_ok());
        }
    }

    #[test]
    fn the_end_of_the_guest_overtakes_commands_and_only_the_first_counts() {
        let mailbox = Mailbox::default();
        let (command, _answers) = pause();
        mailbox.submit(command);
        mailbox.report(Ending::Guest(GuestEnd::Panic));
        mailbox.report(Ending::Guest(GuestEnd::Reset));
        assert!(matches!(
            mailbox.receive(None),
            Message::Ended(Ending::Guest(GuestEnd::Panic))
        ));
        assert!(is_command(&mailbox.receive(None)));
    }

    #[test]
    fn the_end_of_a_guest_that_was_torn_down_is_not_taken_for_that_of_the_next() {
        let mailbox = Mailbox::default();
        mailbox.report(Ending::Guest(GuestEnd::Reset));
        mailbox.forget_ending();
        assert!(matches!(mailbox.receive(Some(Instant::now())), Message::DeadlinePassed));
    }

    #[test]
    fn commands_do_not_put_the_deadline_off() {
        let mailbox = Mailbox::default();
        let (command, _answers) = pause();
        mailbox.submit(command);
        assert!(matches!(mailbox.receive(Some(Instant::now())), Message::DeadlinePassed));
    }

    #[test]
    fn whoever_waits_is_woken_by_a_command_and_by_the_end_of_the_guest() {
        let mailbox = Arc::new(Mailbox::default());
        let waiting = |mailbox: &Arc<Mailbox>| {
            let mailbox = mailbox.clone();
            thread::spawn(move || mailbox.receive(None))
        };
        let waiter = waiting(&mailbox);
        let (command, _answers) = pause();
        mailbox.submit(command);
        assert!(is_command(&waiter.join().expect("the waiter returns")));
        let waiter = waiting(&mailbox);
        mailbox.report(Ending::Guest(GuestEnd::Shutdown));
        assert!(matches!(waiter.join().expect("the waiter returns"), Message::Ended(_)));
    }

    #[test]
    fn a_closed_mailbox_refuses_what_waits_and_what_comes() {
        let mailbox = Mailbox::default();
        let (command, waits) = pause();
        mailbox.submit(command);
        mailbox.close();
        let (command, comes) = pause();
        mailbox.submit(command);
        assert_eq!(refusal(&waits), Refusal::Ended);
        assert_eq!(refusal(&comes), Refusal::Ended);
    }

    #[test]
    fn a_command_of_any_kind_can_be_refused() {
        let mailbox = Mailbox::default();
        mailbox.close();
        let (answer, answers) = channel();
        let reply = Reply::new(move |result: Result<State, Error>| answer.send(result).expect("the test listens"));
        mailbox.submit(Command::State(reply));
        assert!(matches!(
            answers.recv().expect("an answer"),
            Err(Error::Refused(Refusal::Ended))
        ));
    }
}
