//! All that can happen to a small group, looked at by a model checker: what runs is the coordinator, members and standbys
//! themselves, with the guests and gates of the simulation.
//!
//! ```text
//!  a step: a message arrives, is lost, or arrives and comes again │ a guest sends │ the interval is over
//!          a checkpoint is to be stored │ a process or the coordinator dies, the latter also between two of its actions │ a lease ends │ a heartbeat
//! ```
//! A host is a member's process, or a standby's: each may die at any time. Messages of one link do not overtake each
//! other, but take as long as they like. Bounded are the numbers of faults of each kind, of cuts, of frames and of
//! heartbeats (see [`Bounds`]); and the group starts protected. Time is what leases mean: who is taken for dead has not
//! been heard since his lease ended, or is dead. Frames between guests arrive at once: one that takes longer comes after
//! more cuts, not before.

mod decisions;
mod world;

use stateright::{Checker, Model, Property};

use self::world::{COORDINATOR, Role, World};
use crate::engine::Event;
use crate::member::Input;
use crate::vm::Notice;

/// How much of each may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bounds {
    pub members: u16,
    pub cuts: u8,
    pub frames: u8,
    pub deaths: u8,
    pub restarts: u8,
    pub lost: u8,
    pub doubled: u8,
    pub lapses: u8,
    pub beats: u8,
    /// Checkpoints that are asked for.
    pub stores: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Arrives(usize, usize),
    Lost(usize, usize),
    Doubled(usize, usize),
    Due,
    Sends(usize),
    Dies(usize),
    Lapses(usize),
    Silent(usize),
    Beats(usize),
    Stores,
    Restarts,
    /// It dies when it has done so many of its next actions.
    DiesActing(u8),
}

/// A group within bounds.
struct Small(Bounds);

impl Model for Small {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.0)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.violation.is_some() {
            return;
        }
        let left = &world.left;
        for &(from, to) in world.network.keys() {
            steps.push(Step::Arrives(from, to));
            let is_control = from == COORDINATOR || to == COORDINATOR;
            if is_control && left.lost > 0 {
                steps.push(Step::Lost(from, to));
            }
            if is_control && left.doubled > 0 {
                steps.push(Step::Doubled(from, to));
            }
        }
        if left.cuts > 0 {
            steps.push(Step::Due);
        }
        if left.stores > 0 {
            steps.push(Step::Stores);
        }
        if left.restarts > 0 {
            steps.push(Step::Restarts);
            if world.dies_after.is_none() {
                steps.extend((1..4).map(Step::DiesActing));
            }
        }
        for (process, this) in world.processes.iter().enumerate() {
            if world.may_be_silent(process) {
                steps.push(Step::Silent(process));
            }
            if matches!(this.role, Role::Dead { .. }) {
                continue;
            }
            if left.deaths > 0 {
                steps.push(Step::Dies(process));
            }
            if left.beats > 0 && world.is_quiet(process) {
                steps.push(Step::Beats(process));
            }
            if let Role::Member { vm, .. } = &this.role {
                if vm.runs && left.frames > 0 {
                    steps.push(Step::Sends(process));
                }
                if vm.runs && left.lapses > 0 {
                    steps.push(Step::Lapses(process));
                }
            }
        }
    }

    fn next_state(&self, before: &World, step: Step) -> Option<World> {
        let mut world = before.clone();
        match step {
            Step::Arrives(from, to) => world.arrives(from, to),
            Step::Lost(from, to) => {
                world.left.lost -= 1;
                world.take_first(from, to);
            }
            Step::Doubled(from, to) => {
                world.left.doubled -= 1;
                let again = world
                    .network
                    .get(&(from, to))
                    .and_then(|queue| queue.first().cloned())?;
                world.arrives(from, to);
                world.send(from, to, again);
            }
            Step::Due => {
                world.left.cuts -= 1;
                world.decide(Event::Due);
            }
            Step::Sends(process) => {
                world.left.frames -= 1;
                world.sends(process);
            }
            Step::Dies(process) => {
                world.left.deaths -= 1;
                world.dies(process);
            }
            Step::Lapses(process) => {
                world.left.lapses -= 1;
                world.processes[process].clock += 1;
                world.beats(process);
            }
            Step::Silent(process) => world.decide(Event::Silent(world.processes[process].seat)),
            Step::Beats(process) => {
                world.left.beats -= 1;
                world.beats(process);
            }
            Step::Stores => {
                world.left.stores -= 1;
                world.stores();
            }
            Step::Restarts => {
                world.left.restarts -= 1;
                world.restarts();
            }
            Step::DiesActing(after) => {
                world.left.restarts -= 1;
                world.dies_after = Some(after);
            }
        }
        (world != *before).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is violated", |_, world: &World| world.violation.is_none()),
            Property::sometimes("a later cut is permanent", |model: &Self, world: &World| {
                model.0.cuts == 0 || world.journal.permanent() > World::new(model.0).journal.permanent()
            }),
        ]
    }
}

/// What fails; all else is none.
const CALM: Bounds = Bounds {
    members: 3,
    cuts: 1,
    frames: 1,
    deaths: 0,
    restarts: 0,
    lost: 0,
    doubled: 0,
    lapses: 0,
    beats: 0,
    stores: 0,
};

fn look_at(bounds: Bounds) {
    let checker = Small(bounds).checker().threads(2).spawn_bfs().join();
    println!("{bounds:?}: {} states", checker.unique_state_count());
    if let Some(path) = checker.discovery("nothing is violated") {
        let last = path.last_state().violation.clone();
        panic!("{last:?} after {:#?}", path.into_actions());
    }
    checker.assert_properties();
}

#[test]
fn a_cut_of_three_members_with_frames_at_any_time() {
    look_at(Bounds { frames: 2, ..CALM });
}

#[test]
fn whoever_of_three_members_and_their_standbys_dies_and_whenever() {
    look_at(Bounds {
        deaths: 1,
        frames: 0,
        ..CALM
    });
}

#[test]
fn any_two_of_two_members_and_their_standbys_die() {
    look_at(Bounds {
        members: 2,
        deaths: 2,
        ..CALM
    });
}

#[test]
fn a_message_is_lost_and_said_again() {
    look_at(Bounds {
        members: 1,
        lost: 1,
        beats: 3,
        frames: 0,
        ..CALM
    });
}

#[test]
fn a_message_comes_twice_also_after_the_next_cut_has_begun() {
    look_at(Bounds {
        members: 2,
        doubled: 1,
        cuts: 2,
        ..CALM
    });
}

#[test]
fn the_coordinator_dies_at_any_time_and_in_the_middle_of_what_it_does() {
    look_at(Bounds {
        members: 2,
        restarts: 1,
        frames: 0,
        ..CALM
    });
}

#[test]
fn the_coordinator_and_a_member_die() {
    look_at(Bounds {
        members: 1,
        restarts: 1,
        deaths: 1,
        beats: 1,
        ..CALM
    });
}

#[test]
fn a_member_that_is_only_out_of_reach_stops_before_another_takes_its_place() {
    look_at(Bounds {
        members: 1,
        lapses: 1,
        beats: 2,
        ..CALM
    });
}

#[test]
fn a_checkpoint_that_is_stored_is_of_one_cut_without_orphans() {
    look_at(Bounds {
        members: 2,
        stores: 1,
        ..CALM
    });
}

#[test]
fn a_checkpoint_is_whole_or_not_there_whoever_dies() {
    look_at(Bounds {
        members: 2,
        stores: 1,
        deaths: 1,
        frames: 0,
        ..CALM
    });
}

#[test]
fn a_checkpoint_is_whole_or_not_there_if_the_coordinator_dies() {
    look_at(Bounds {
        members: 1,
        stores: 2,
        restarts: 1,
        frames: 0,
        ..CALM
    });
}

/// A group of two in which a checkpoint is being stored, that is prepared by both and of which nobody has said so yet.
fn storing() -> World {
    let mut world = World::new(Bounds {
        members: 2,
        stores: 3,
        ..CALM
    });
    world.stores();
    for member in 0..2 {
        world.arrives(COORDINATOR, member);
    }
    world
}

/// Stores another checkpoint, undisturbed, and checks that there is one.
fn stores_another(mut world: World) {
    world.left.stores -= 1;
    world.stores();
    world.calm();
    assert_eq!(world.violation, None);
    let permanent = world.journal.permanent().expect("it is protected");
    assert_eq!(world.answers.last(), Some(&Ok(permanent)));
}

#[test]
fn a_member_that_dies_while_a_checkpoint_is_stored_ends_it_and_the_group_goes_back_to_the_cut_before() {
    let mut world = storing();
    let before = world.journal.permanent();
    world.dies(0);
    world.decide(Event::Silent(world.processes[0].seat));
    assert_eq!(world.answers, [Err("'0' failed: nothing is heard of it".to_owned())]);
    world.calm();
    assert!(before.is_some() && world.recovered, "{:?}", world.journal);
    assert_eq!(world.violation, None);
}

#[test]
fn a_snapshot_that_cannot_be_made_ends_the_checkpoint_and_nothing_else() {
    let mut world = storing();
    let id = world.checkpoint();
    let over = Notice::SnapshotOver(id, Err("there is no room".to_owned()));
    world.member(1, Input::Notice(over));
    world.calm();
    assert_eq!(world.answers, [Err("'1': there is no room".to_owned())]);
    assert!(world.is_protected());
    stores_another(world);
}

#[test]
fn a_coordinator_that_is_started_anew_knows_of_no_checkpoint_and_can_store_another() {
    let mut world = storing();
    world.restarts();
    world.calm();
    (0..world.processes.len()).for_each(|process| world.beats(process));
    world.calm();
    assert_eq!(world.answers, []);
    assert!(world.is_protected());
    stores_another(world);
}
