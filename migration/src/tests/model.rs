//! A model of the protocol's end, where it is decided who runs the VM, and every way it can go: messages are lost, late
//! or come twice, either host loses power at any time, and anybody loses patience whenever he waits.
//!
//! ```text
//!  source        Runs ─► Stopped ─ Handoff ─► HandedOver ─┬─ Running ─► Gone
//!                  ▲        │                             ├─ Abort ───► Runs
//!                  └────────┘ any error                   └─ nothing ─► Parked: never runs by itself
//!  destination   Empty ─ State ─► Ready ─ Handoff ─► Runs
//!                  ▲                │
//!                  └────────────────┘ any error: Abort
//!
//!  with post-copy, after Handoff:  Serving ─ Rest ─► RunsPartly ─► Runs ─┬─ Complete ─► Gone
//!                                                                        └─ nothing ──► Parked
//! ```
//! A link keeps order and loses nothing in between, as TCP does; it is modelled without that: what holds in a network
//! that does worse holds on TCP too.

use stateright::{Checker, Model, Property};

/// What is said; all else is before the point that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Said {
    State,
    Ready,
    Handoff,
    Running,
    /// Pages that were missing (post-copy).
    Rest,
    Complete,
    /// By the destination: it does not run, and never will.
    DestinationAborts,
    SourceAborts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    Runs,
    Stopped,
    HandedOver,
    /// Knows that the VM runs there, and sends the rest of it.
    Serving,
    /// Knows that the VM runs there, and has nothing of it.
    Gone,
    /// Does not know.
    Parked,
    /// The host lost power.
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Destination {
    Waiting,
    Ready,
    Runs,
    /// Runs, and lacks some of its memory.
    RunsPartly,
    /// The rest did not come: it cannot go on.
    Lost,
    /// Nothing is left of the VM.
    Empty,
    Dead,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Hosts {
    source: Source,
    destination: Destination,
    /// What is on its way; it may arrive any number of times, or never.
    network: Vec<Said>,
    /// Whether the migration is over for the source, whose VM goes on.
    over: bool,
    /// Whether anybody lost power, or patience with a silent peer, ever.
    undisturbed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    /// The source stops its guest and sends its state.
    Stop,
    Deliver(Said),
    Lose(Said),
    /// Whoever waits does so no longer.
    SourceGivesUp,
    DestinationGivesUp,
    SourceDies,
    DestinationDies,
}

struct Protocol {
    /// Whether memory follows.
    post_copy: bool,
    /// What the source does wrong, to see that the model would notice.
    mistake: Option<Mistake>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mistake {
    /// It goes on by itself when no answer to Handoff comes.
    ResumesAfterHandoff,
    /// The destination runs the VM when it is ready, before it is told.
    RunsWhenReady,
}

impl Hosts {
    fn say(&mut self, said: Said) {
        if let Err(at) = self.network.binary_search(&said) {
            self.network.insert(at, said);
        }
    }

    fn running(&self) -> usize {
        let there = matches!(self.destination, Destination::Runs | Destination::RunsPartly);
        usize::from(self.source == Source::Runs) + usize::from(there)
    }

    /// The source goes on here: nothing came of it.
    fn resume(&mut self) {
        self.source = Source::Runs;
        self.over = true;
        self.say(Said::SourceAborts);
    }

    fn discard(&mut self) {
        if self.destination == Destination::RunsPartly {
            self.destination = Destination::Lost;
        } else {
            self.destination = Destination::Empty;
            self.say(Said::DestinationAborts);
        }
    }
}

impl Model for Protocol {
    type State = Hosts;
    type Action = Step;

    fn init_states(&self) -> Vec<Hosts> {
        vec![Hosts {
            source: Source::Runs,
            destination: Destination::Waiting,
            network: Vec::new(),
            over: false,
            undisturbed: true,
        }]
    }

    fn actions(&self, hosts: &Hosts, steps: &mut Vec<Step>) {
        if hosts.source == Source::Runs && !hosts.over {
            steps.push(Step::Stop);
        }
        for &said in &hosts.network {
            steps.extend([Step::Deliver(said), Step::Lose(said)]);
        }
        if matches!(hosts.source, Source::Stopped | Source::HandedOver | Source::Serving) {
            steps.push(Step::SourceGivesUp);
        }
        if matches!(
            hosts.destination,
            Destination::Waiting | Destination::Ready | Destination::RunsPartly
        ) {
            steps.push(Step::DestinationGivesUp);
        }
        if hosts.source != Source::Dead {
            steps.push(Step::SourceDies);
        }
        if hosts.destination != Destination::Dead {
            steps.push(Step::DestinationDies);
        }
    }

    fn next_state(&self, before: &Hosts, step: Step) -> Option<Hosts> {
        let mut hosts = before.clone();
        match step {
            Step::Stop => {
                hosts.source = Source::Stopped;
                hosts.say(Said::State);
            }
            // It stays on its way: it may come again.
            Step::Deliver(said) => self.deliver(&mut hosts, said),
            Step::Lose(said) => {
                hosts.network.retain(|&other| other != said);
            }
            Step::SourceGivesUp => {
                hosts.undisturbed = false;
                match hosts.source {
                    Source::Stopped => hosts.resume(),
                    _ if self.mistake == Some(Mistake::ResumesAfterHandoff) => hosts.resume(),
                    _ => hosts.source = Source::Parked,
                }
            }
            Step::DestinationGivesUp => {
                hosts.undisturbed = false;
                hosts.discard();
            }
            Step::SourceDies => {
                hosts.undisturbed = false;
                hosts.source = Source::Dead;
            }
            Step::DestinationDies => {
                hosts.undisturbed = false;
                hosts.destination = Destination::Dead;
            }
        }
        (hosts != *before).then_some(hosts)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two run", |_, hosts: &Hosts| hosts.running() <= 1),
            Property::always(
                "if none runs, a host is dead, memory was lost after the switch, or the source says that it does not know",
                |protocol: &Self, hosts: &Hosts| {
                    let undecided = matches!(hosts.source, Source::Stopped | Source::HandedOver);
                    let told = hosts.source == Source::Parked;
                    let lost = hosts.source == Source::Dead
                        || hosts.destination == Destination::Dead
                        || (protocol.post_copy && hosts.destination == Destination::Lost);
                    hosts.running() == 1 || undecided || told || lost
                },
            ),
            Property::always(
                "a source lets go only of a VM that runs, or ran, at the destination",
                |_, hosts: &Hosts| {
                    hosts.source != Source::Gone || matches!(hosts.destination, Destination::Runs | Destination::Dead)
                },
            ),
            Property::always("undisturbed, nobody is left in doubt", |_, hosts: &Hosts| {
                !hosts.undisturbed || hosts.source != Source::Parked
            }),
            Property::sometimes("it moves", |_, hosts: &Hosts| {
                hosts.source == Source::Gone && hosts.destination == Destination::Runs
            }),
            Property::sometimes(
                "it goes on where it was, though it had been handed over",
                |_, hosts: &Hosts| {
                    hosts.source == Source::Runs
                        && hosts.network.contains(&Said::Handoff)
                        && hosts.destination == Destination::Empty
                },
            ),
        ]
    }
}

impl Protocol {
    /// `said` arrives: who does not expect it does nothing, as on a link that ended.
    fn deliver(&self, hosts: &mut Hosts, said: Said) {
        match (said, hosts.source, hosts.destination) {
            (Said::State, _, Destination::Waiting) => {
                hosts.destination = match self.mistake {
                    Some(Mistake::RunsWhenReady) => Destination::Runs,
                    _ => Destination::Ready,
                };
                hosts.say(Said::Ready);
            }
            (Said::Ready, Source::Stopped, _) => {
                hosts.source = Source::HandedOver;
                hosts.say(Said::Handoff);
            }
            (Said::Handoff, _, Destination::Ready) => {
                hosts.destination = match self.post_copy {
                    true => Destination::RunsPartly,
                    false => Destination::Runs,
                };
                hosts.say(Said::Running);
            }
            (Said::Running, Source::HandedOver, _) if self.post_copy => {
                hosts.source = Source::Serving;
                hosts.say(Said::Rest);
            }
            (Said::Running, Source::HandedOver, _) => hosts.source = Source::Gone,
            (Said::Rest, _, Destination::RunsPartly) => {
                hosts.destination = Destination::Runs;
                hosts.say(Said::Complete);
            }
            (Said::Complete, Source::Serving, _) => hosts.source = Source::Gone,
            (Said::DestinationAborts, Source::Stopped | Source::HandedOver, _) => hosts.resume(),
            (Said::SourceAborts, _, Destination::Waiting | Destination::Ready) => hosts.discard(),
            _ => (),
        }
    }
}

#[test]
fn whatever_is_lost_late_or_doubled_and_whoever_dies_two_never_run_and_none_only_if_that_is_said() {
    for post_copy in [false, true] {
        let protocol = Protocol {
            post_copy,
            mistake: None,
        };
        let checker = protocol.checker().spawn_bfs().join();
        assert!(checker.unique_state_count() > 100);
        checker.assert_properties();
    }
}

#[test]
fn the_model_notices_a_source_that_resumes_by_itself_and_a_destination_that_does_not_wait() {
    for mistake in [Mistake::ResumesAfterHandoff, Mistake::RunsWhenReady] {
        let protocol = Protocol {
            post_copy: false,
            mistake: Some(mistake),
        };
        let checker = protocol.checker().spawn_bfs().join();
        checker.assert_any_discovery("never two run");
    }
}
