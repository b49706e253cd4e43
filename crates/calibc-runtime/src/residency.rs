//! Which steps are in GPU memory, and when another may take the place of one: decided here, done by whoever is behind [`Queues`].
//!
//! A window has slots, each with room for one step. Work that needs a step finds it in a slot, or has it uploaded on a queue of
//! copies beside the caller's streams; then the step that is likely to come next is uploaded into the slot that was entered
//! longest ago. Nothing waits on the host: uploads wait on the GPU for the last use of what they overwrite, and streams for the
//! upload they need.

/// Which steps' work lists and masks GPU memory holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residency {
    /// Those of every step.
    #[default]
    All,
    /// Those of so many steps, at least 2. While one runs, the next one's are uploaded from pinned host memory.
    Window(u32),
}

/// A stream of a caller's, by its handle.
pub(crate) type StreamId = u64;

/// What a window asks of the GPU. Each call submits work and returns; streams do what they are given in order, at any later time.
pub(crate) trait Queues {
    /// Why work could not be submitted.
    type Error;

    /// Marks everything `stream` was given so far as the last use of `slot`.
    fn record_use(&mut self, slot: usize, stream: StreamId) -> Result<(), Self::Error>;

    /// Makes later uploads wait for what [`Queues::record_use`] marked last for `slot`.
    fn await_use(&mut self, slot: usize) -> Result<(), Self::Error>;

    /// Uploads `step` into `slot` and marks the end of it. From its start on, the step that was there is nowhere.
    fn upload(&mut self, slot: usize, step: u32, evicted: Option<u32>) -> Result<(), Self::Error>;

    /// Makes later work of `stream` wait for the last upload into `slot`.
    fn await_upload(&mut self, slot: usize, stream: StreamId) -> Result<(), Self::Error>;
}

#[derive(Clone, Debug, Default)]
struct Slot {
    step: Option<u32>,
    /// When it was last entered, by the window's clock.
    entered: u64,
    /// Whose use was marked last; `None` if uploads wait for every use already.
    user: Option<StreamId>,
    /// A stream that waits for the last upload. Its handle is enough: a stream that is gone has done what it waited for.
    waiter: Option<StreamId>,
}

/// The slots of a window over the steps of a plan.
#[derive(Debug)]
pub(crate) struct Window {
    slots: Vec<Slot>,
    /// Slot of each step.
    slot_of: Vec<Option<usize>>,
    /// The step that came after each step, last time.
    next_of: Vec<u32>,
    /// The step entered last.
    current: Option<u32>,
    clock: u64,
    /// Uses of whatever was in the window: launches that read their step from memory.
    any_user: Option<StreamId>,
}

impl Window {
    /// A window of `slots` slots, at least 2, over `steps` steps, at least as many. All slots are empty.
    pub(crate) fn new(slots: usize, steps: u32) -> Self {
        Self {
            slots: vec![Slot::default(); slots],
            slot_of: vec![None; steps as usize],
            next_of: (0..steps).map(|step| (step + 1) % steps).collect(),
            current: None,
            clock: 0,
            any_user: None,
        }
    }

    /// The number by which [`Queues`] knows uses of any slot.
    pub(crate) fn any_slot(&self) -> usize {
        self.slots.len()
    }

    /// Brings `step` into the window and makes `stream` wait until it is there. Returns its slot, for [`Window::used`].
    pub(crate) fn need<Q: Queues>(&mut self, step: u32, stream: StreamId, queues: &mut Q) -> Result<usize, Q::Error> {
        let slot = match self.slot_of[step as usize] {
            Some(slot) => slot,
            None => self.fill(step, None, queues)?,
        };
        self.wait(slot, stream, queues)?;
        Ok(slot)
    }

    /// `stream` was given work that reads `slot`.
    pub(crate) fn used<Q: Queues>(&mut self, slot: usize, stream: StreamId, queues: &mut Q) -> Result<(), Q::Error> {
        let user = &mut self.slots[slot].user;
        if user.is_some_and(|user| user != stream) {
            queues.await_use(slot)?;
        }
        queues.record_use(slot, stream)?;
        *user = Some(stream);
        Ok(())
    }

    /// Makes `stream` wait for whatever is on its way into the window.
    pub(crate) fn need_any<Q: Queues>(&mut self, stream: StreamId, queues: &mut Q) -> Result<(), Q::Error> {
        (0..self.slots.len()).try_for_each(|slot| self.wait(slot, stream, queues))
    }

    /// `stream` was given work that reads one slot or another.
    pub(crate) fn used_any<Q: Queues>(&mut self, stream: StreamId, queues: &mut Q) -> Result<(), Q::Error> {
        let any = self.any_slot();
        if self.any_user.is_some_and(|user| user != stream) {
            queues.await_use(any)?;
        }
        queues.record_use(any, stream)?;
        self.any_user = Some(stream);
        Ok(())
    }

    /// Work at `step`, which is in the window, has begun: brings the step that followed it last time.
    pub(crate) fn enter<Q: Queues>(&mut self, step: u32, queues: &mut Q) -> Result<(), Q::Error> {
        if self.current == Some(step) {
            return Ok(());
        }
        if let Some(before) = self.current.replace(step) {
            self.next_of[before as usize] = step;
        }
        self.clock += 1;
        if let Some(slot) = self.slot_of[step as usize] {
            self.slots[slot].entered = self.clock;
        }
        self.prefetch(self.next_of[step as usize], queues)
    }

    /// Brings `step` into the window, in the place of any but the one at work.
    pub(crate) fn prefetch<Q: Queues>(&mut self, step: u32, queues: &mut Q) -> Result<(), Q::Error> {
        if self.slot_of[step as usize].is_none() {
            let at_work = self.current.and_then(|current| self.slot_of[current as usize]);
            self.fill(step, at_work, queues)?;
        }
        Ok(())
    }

    fn wait<Q: Queues>(&mut self, slot: usize, stream: StreamId, queues: &mut Q) -> Result<(), Q::Error> {
        let Slot { step, waiter, .. } = &mut self.slots[slot];
        if step.is_some() && *waiter != Some(stream) {
            queues.await_upload(slot, stream)?;
            *waiter = Some(stream);
        }
        Ok(())
    }

    /// Uploads `step` into an empty slot, else the one that was entered longest ago; not into `spared`.
    fn fill<Q: Queues>(&mut self, step: u32, spared: Option<usize>, queues: &mut Q) -> Result<usize, Q::Error> {
        let age = |&slot: &usize| (self.slots[slot].step.is_some(), self.slots[slot].entered, slot);
        let slot = (0..self.slots.len()).filter(|&slot| spared != Some(slot)).min_by_key(age);
        let slot = slot.expect("a window has two slots or more, of which one is spared");
        if self.any_user.take().is_some() {
            queues.await_use(self.slots.len())?;
        }
        let old = std::mem::take(&mut self.slots[slot]);
        if let Some(evicted) = old.step {
            self.slot_of[evicted as usize] = None;
        }
        if old.user.is_some() {
            queues.await_use(slot)?;
        }
        queues.upload(slot, step, old.step)?;
        // What was never entered is as old as what was entered before it.
        self.slots[slot] = Slot { step: Some(step), entered: self.clock, user: None, waiter: None };
        self.slot_of[step as usize] = Some(slot);
        Ok(slot)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, VecDeque};
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// Work of one stream of the simulated GPU.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Work {
        Record { event: usize, version: u64 },
        Await { event: usize, version: u64 },
        Upload { slot: usize, step: u32, evicted: Option<u32> },
        Kernel { step: u32 },
    }

    /// A GPU of a few streams that does its work in any order that streams and events allow. Queue 0 is the copies'.
    struct Gpu {
        queues: Vec<VecDeque<Work>>,
        /// Per event, how often the host recorded it, and which of these records the GPU has reached: they may be on different
        /// streams. First the ends of uploads, then uses.
        recorded: Vec<u64>,
        reached: Vec<BTreeSet<u64>>,
        slots: usize,
        /// Slot of each step, as kernels see it; and what is in each slot.
        table: Vec<Option<usize>>,
        content: Vec<Option<u32>>,
        /// What each queue is at: kernels and uploads take time.
        busy: Vec<Option<(usize, Work)>>,
        uploads: usize,
    }

    impl Gpu {
        fn new(streams: usize, slots: usize, steps: usize) -> Self {
            let events = 2 * slots + 1;
            Self {
                queues: vec![VecDeque::new(); streams + 1],
                recorded: vec![0; events],
                reached: vec![BTreeSet::new(); events],
                slots,
                table: vec![None; steps],
                content: vec![None; slots],
                busy: vec![None; streams + 1],
                uploads: 0,
            }
        }

        fn record(&mut self, event: usize, queue: usize) {
            self.recorded[event] += 1;
            self.queues[queue].push_back(Work::Record { event, version: self.recorded[event] });
        }

        fn wait(&mut self, event: usize, queue: usize) {
            // What was never recorded holds nothing up.
            if self.recorded[event] > 0 {
                self.queues[queue].push_back(Work::Await { event, version: self.recorded[event] });
            }
        }

        /// Starts or ends something on `queue`, if it can; says what is wrong with it.
        fn advance(&mut self, queue: usize) -> Result<(), String> {
            if let Some((slot, work)) = self.busy[queue].take() {
                if let Work::Upload { step, .. } = work {
                    self.content[slot] = Some(step);
                    self.table[step as usize] = Some(slot);
                }
                return Ok(());
            }
            let Some(&work) = self.queues[queue].front() else { return Ok(()) };
            match work {
                Work::Await { event, version } if !self.reached[event].contains(&version) => return Ok(()),
                Work::Await { .. } => {}
                Work::Record { event, version } => {
                    self.reached[event].insert(version);
                }
                Work::Upload { slot, evicted, .. } => {
                    for other in self.busy.iter().flatten() {
                        if other.0 == slot {
                            return Err(format!("{work:?} while {other:?}"));
                        }
                    }
                    self.content[slot] = None;
                    if let Some(evicted) = evicted {
                        self.table[evicted as usize] = None;
                    }
                    self.busy[queue] = Some((slot, work));
                }
                Work::Kernel { step } => {
                    let slot = self.table[step as usize].ok_or(format!("step {step} is nowhere"))?;
                    if self.content[slot] != Some(step) {
                        return Err(format!("step {step}: slot {slot} holds {:?}", self.content[slot]));
                    }
                    self.busy[queue] = Some((slot, work));
                }
            }
            self.queues[queue].pop_front();
            Ok(())
        }

        fn idle(&self) -> bool {
            self.queues.iter().all(VecDeque::is_empty) && self.busy.iter().all(Option::is_none)
        }

        /// Finishes everything; an error if it cannot.
        fn drain(&mut self) -> Result<(), String> {
            let work: usize = self.queues.iter().map(|queue| 2 * queue.len() + 2).sum();
            for _ in 0..work {
                (0..self.queues.len()).try_for_each(|queue| self.advance(queue))?;
            }
            if self.idle() { Ok(()) } else { Err(format!("stuck: {:?}", self.queues)) }
        }
    }

    impl Queues for Gpu {
        type Error = Infallible;

        fn record_use(&mut self, slot: usize, stream: StreamId) -> Result<(), Infallible> {
            self.record(self.slots + slot, stream as usize);
            Ok(())
        }

        fn await_use(&mut self, slot: usize) -> Result<(), Infallible> {
            self.wait(self.slots + slot, 0);
            Ok(())
        }

        fn upload(&mut self, slot: usize, step: u32, evicted: Option<u32>) -> Result<(), Infallible> {
            self.uploads += 1;
            self.queues[0].push_back(Work::Upload { slot, step, evicted });
            self.record(slot, 0);
            Ok(())
        }

        fn await_upload(&mut self, slot: usize, stream: StreamId) -> Result<(), Infallible> {
            self.wait(slot, stream as usize);
            Ok(())
        }
    }

    fn ok<T>(result: Result<T, Infallible>) -> T {
        result.unwrap_or_else(|never| match never {})
    }

    /// As the engine launches at a step known on the host.
    fn launch(window: &mut Window, gpu: &mut Gpu, step: u32, stream: u64) {
        let slot = ok(window.need(step, stream, gpu));
        gpu.queues[stream as usize].push_back(Work::Kernel { step });
        ok(window.used(slot, stream, gpu));
        ok(window.enter(step, gpu));
    }

    /// As the engine announces the step of launches that read it from memory.
    fn announce(window: &mut Window, gpu: &mut Gpu, step: u32, stream: u64) {
        ok(window.used_any(stream, gpu));
        ok(window.need(step, stream, gpu));
        ok(window.enter(step, gpu));
    }

    #[test]
    fn steps_in_order_are_uploaded_ahead_and_once() {
        let (steps, layers) = (7, 3);
        let (mut window, mut gpu) = (Window::new(2, steps), Gpu::new(1, 2, steps as usize));
        for round in 0..3 {
            for step in 0..steps {
                for layer in 0..layers {
                    let before = gpu.uploads;
                    launch(&mut window, &mut gpu, step, 1);
                    // The first launch of all brings its own step and the next; later the first of each step brings the next.
                    let brings = if layer > 0 { 0 } else { 1 + usize::from((round, step) == (0, 0)) };
                    assert_eq!(gpu.uploads - before, brings, "round {round}, s{step}.l{layer}");
                }
            }
        }
        gpu.drain().unwrap();
    }

    #[test]
    fn the_order_of_steps_is_learnt() {
        let order = [0, 2, 4, 6, 9];
        let (mut window, mut gpu) = (Window::new(2, 10), Gpu::new(1, 2, 10));
        order.iter().for_each(|&step| launch(&mut window, &mut gpu, step, 1));
        launch(&mut window, &mut gpu, 0, 1);
        // From here on each step is there before its first launch.
        for &step in order.iter().skip(1).chain(&order) {
            assert!(window.slot_of[step as usize].is_some(), "step {step}");
            launch(&mut window, &mut gpu, step, 1);
        }
        gpu.drain().unwrap();
    }

    #[test]
    fn an_upload_leaves_the_step_at_work_alone() {
        let (mut window, mut gpu) = (Window::new(2, 5), Gpu::new(1, 2, 5));
        launch(&mut window, &mut gpu, 3, 1);
        for step in [0, 1, 2, 4, 0] {
            ok(window.prefetch(step, &mut gpu));
            assert!(window.slot_of[3].is_some() && window.slot_of[step as usize].is_some(), "{window:?}");
        }
        gpu.drain().unwrap();
    }

    #[test]
    fn nothing_is_submitted_for_a_second_launch_but_its_use() {
        let (mut window, mut gpu) = (Window::new(2, 5), Gpu::new(1, 2, 5));
        launch(&mut window, &mut gpu, 0, 1);
        gpu.drain().unwrap();
        launch(&mut window, &mut gpu, 0, 1);
        let left: Vec<Work> = gpu.queues.iter().flatten().copied().collect();
        assert!(matches!(left[..], [Work::Kernel { step: 0 }, Work::Record { .. }]), "{left:?}");
    }

    #[derive(Clone, Debug)]
    enum Act {
        /// A launch at a step known on the host.
        Launch {
            step: u32,
            stream: u64,
        },
        /// A step announced, and replays at it on the same stream.
        Replay {
            step: u32,
            stream: u64,
            times: usize,
        },
        /// A launch that reads the step announced last, submitted directly on any stream.
        Direct {
            stream: u64,
        },
        Prefetch {
            step: u32,
        },
        /// The GPU does something.
        Advance {
            queue: usize,
        },
    }

    const STEPS: u32 = 6;
    const STREAMS: usize = 3;

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let (step, stream) = (0..STEPS, 1..=STREAMS as u64);
        let act = prop_oneof![
            4 => (step.clone(), stream.clone()).prop_map(|(step, stream)| Act::Launch { step, stream }),
            1 => (step.clone(), stream.clone(), 1..4_usize)
                .prop_map(|(step, stream, times)| Act::Replay { step, stream, times }),
            1 => stream.prop_map(|stream| Act::Direct { stream }),
            1 => step.prop_map(|step| Act::Prefetch { step }),
            8 => (0..=STREAMS).prop_map(|queue| Act::Advance { queue }),
        ];
        proptest::collection::vec(act, 0..120)
    }

    proptest! {
        /// Whatever callers do and however the GPU goes about it, each kernel reads its own step from beginning to end.
        #[test]
        fn every_launch_reads_its_own_step(slots in 2..4_usize, acts in acts()) {
            let (mut window, mut gpu) = (Window::new(slots, STEPS), Gpu::new(STREAMS, slots, STEPS as usize));
            let mut announced = None;
            let fine = |done: Result<(), String>| done.map_err(TestCaseError::fail);
            for act in acts {
                match act {
                    Act::Launch { step, stream } => {
                        // Replays must be ordered before the next step that is named: here, by announcing on their stream.
                        if let Some((_, replays)) = announced.take() {
                            ok(window.used_any(replays, &mut gpu));
                        }
                        launch(&mut window, &mut gpu, step, stream);
                    }
                    Act::Replay { step, stream, times } => {
                        if let Some((_, replays)) = announced.take() {
                            ok(window.used_any(replays, &mut gpu));
                        }
                        announce(&mut window, &mut gpu, step, stream);
                        (0..times).for_each(|_| gpu.queues[stream as usize].push_back(Work::Kernel { step }));
                        announced = Some((step, stream));
                    }
                    Act::Direct { stream } => if let Some((step, _)) = announced {
                        ok(window.need_any(stream, &mut gpu));
                        gpu.queues[stream as usize].push_back(Work::Kernel { step });
                        ok(window.used_any(stream, &mut gpu));
                    },
                    Act::Prefetch { step } => {
                        if let Some((_, replays)) = announced {
                            ok(window.used_any(replays, &mut gpu));
                        }
                        ok(window.prefetch(step, &mut gpu));
                    }
                    Act::Advance { queue } => fine(gpu.advance(queue))?,
                }
                // The step at work stays.
                prop_assert!(window.current.is_none_or(|step| window.slot_of[step as usize].is_some()));
                let held = window.slot_of.iter().flatten().count();
                prop_assert!(held <= slots);
            }
            fine(gpu.drain())?;
        }
    }
}
