//! What this process may use of its machine, and what others use of it.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// Cores that this process may use now: its affinity and its group's quota limit them.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that this process may still take: what the machine has available, or its group's
/// limit leaves. `None` where the system does not tell.
pub(crate) fn available_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let of_group = system.cgroup_limits().map(|limits| limits.free_memory);
    let of_machine = Some(system.available_memory()).filter(|&bytes| bytes > 0)?;
    Some(of_group.map_or(of_machine, |bytes| bytes.min(of_machine)))
}

/// Cores in use, on average over some time, of those that this process may run on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Usage {
    /// By other processes, and by other machines that share the processor.
    pub others: f64,
    /// By nobody.
    pub idle: f64,
}

/// Looks at the cores' usage from time to time.
#[derive(Default)]
pub(crate) struct Watch {
    last: Option<Sample>,
}

/// Seconds since a start of each clock's own.
#[derive(Clone, Copy)]
struct Sample {
    at: Instant,
    own: f64,
    busy: f64,
    idle: f64,
}

impl Watch {
    /// The usage since the last look; `None` for the first one, and where the system does not tell.
    pub fn usage(&mut self) -> Option<Usage> {
        let now = sample()?;
        let last = self.last.replace(now)?;
        let seconds = (now.at - last.at).as_secs_f64().max(1e-3);
        let cores = |now: f64, last: f64| (now - last) / seconds;
        let own = cores(now.own, last.own);
        let others = (cores(now.busy, last.busy) - own).max(0.0);
        Some(Usage { others, idle: cores(now.idle, last.idle) })
    }
}

#[cfg(not(target_os = "linux"))]
fn sample() -> Option<Sample> {
    None
}

/// From /proc/stat, which counts ticks of each core, and the process's own clock.
#[cfg(target_os = "linux")]
fn sample() -> Option<Sample> {
    let cores = rustix::thread::sched_getaffinity(None).ok()?;
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let at = Instant::now();
    let own = clock_gettime(ClockId::ProcessCPUTime);
    let (busy, idle) = ticks(&text, |core| cores.is_set(core))?;
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    Some(Sample {
        at,
        own: own.tv_sec as f64 + own.tv_nsec as f64 * 1e-9,
        busy: busy / per_second,
        idle: idle / per_second,
    })
}

/// Ticks of some cores, busy and idle, from the text of /proc/stat: a line has a core's name, and
/// its ticks for users, nice users, the system, idle, waiting for disks, interrupts, soft interrupts
/// and other machines (proc_stat(5)); of guests' ticks, users have them too.
fn ticks(text: &str, is_ours: impl Fn(usize) -> bool) -> Option<(f64, f64)> {
    let (mut busy, mut idle, mut found) = (0.0, 0.0, false);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let core =
            words.next().and_then(|name| name.strip_prefix("cpu")).and_then(|n| n.parse().ok());
        if !core.is_some_and(&is_ours) {
            continue;
        }
        let all: Vec<f64> = words.take(8).filter_map(|word| word.parse().ok()).collect();
        let resting = all.get(3)? + all.get(4)?;
        busy += all.iter().sum::<f64>() - resting;
        idle += resting;
        found = true;
    }
    found.then_some((busy, idle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_those_of_the_cores_that_are_ours() {
        let text = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 1 2 3 100 10 4 5 6 50 0\ncpu1 7 0 0 200 0 0 0 1 0 0\n\
                    cpu12 1 1 1 1 1 1 1 1 0 0\nintr 5\n";
        assert_eq!(ticks(text, |core| core == 0), Some((21.0, 110.0)));
        assert_eq!(ticks(text, |core| core < 2), Some((29.0, 310.0)));
        assert_eq!(ticks(text, |core| core == 2), None);
        assert_eq!(ticks("cpu0 1 2 3\n", |_| true), None, "a system that counts less");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_system_tells() {
        let mut watch = Watch::default();
        assert_eq!(watch.usage(), None);
        std::thread::sleep(std::time::Duration::from_millis(50));
        let usage = watch.usage().unwrap();
        assert!(usage.others >= 0.0 && usage.idle >= 0.0, "{usage:?}");
    }
}
