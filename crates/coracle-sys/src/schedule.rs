//! How the kernel treats a process: CPUs, scheduler, input and output, memory nodes, personality.
//!
//! All of it concerns the calling thread and is inherited by what it executes.
//!
//! Source: sched_setattr(2), sched_setaffinity(2), ioprio_set(2), set_mempolicy(2), personality(2);
//! `linux/sched/types.h`.

use std::{fmt, io};

/// Highest CPU or memory node that a [`Mask`] takes: beyond what any kernel is configured for.
pub const MASK_BITS_MAX: usize = 1 << 16;

/// Of the kernel's `unsigned long` on the architectures that there are binaries for.
const WORD_BITS: usize = 64;

/// `struct sched_attr` up to its second version, whose layout this is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SchedulerAttributes {
    /// Of the structure; [`set_scheduler`] fills it in.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For the normal policies.
    pub nice: i32,
    /// For the real-time policies.
    pub priority: u32,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub runtime: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub deadline: u64,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub period: u64,
    /// With `SCHED_FLAG_UTIL_CLAMP_MIN`.
    pub utilisation_min: u32,
    /// With `SCHED_FLAG_UTIL_CLAMP_MAX`.
    pub utilisation_max: u32,
}

/// A set of CPUs or memory nodes, as the kernel reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mask(Vec<u64>);

impl fmt::LowerHex for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = self.0.iter().rev().skip_while(|word| **word == 0);
        fmt::LowerHex::fmt(words.next().unwrap_or(&0), f)?;
        words.try_for_each(|word| write!(f, "{word:016x}"))
    }
}

impl Mask {
    /// Reads a list such as `0-3,7`. Blanks and empty elements are passed over; `None` stands for what is no list,
    /// or beyond [`MASK_BITS_MAX`].
    #[must_use]
    pub fn parse(list: &str) -> Option<Self> {
        let mut mask = Self::default();
        for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (usize, usize) = (number(first)?, number(last)?);
            if first > last || last > MASK_BITS_MAX {
                return None;
            }
            (first..=last).for_each(|bit| mask.set(bit));
        }
        Some(mask)
    }

    fn set(&mut self, bit: usize) {
        let idx = bit / WORD_BITS;
        if self.0.len() <= idx {
            self.0.resize(idx + 1, 0);
        }
        if let Some(word) = self.0.get_mut(idx) {
            *word |= 1 << (bit % WORD_BITS);
        }
    }

    /// How many are in it.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

/// Digits only: `parse` would take a sign.
fn number(text: &str) -> Option<usize> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

/// Chooses the scheduler.
///
/// # Errors
/// `EPERM` without `CAP_SYS_NICE` where it is needed, `EINVAL` for values that do not fit the policy.
pub fn set_scheduler(attributes: &SchedulerAttributes) -> io::Result<()> {
    let size = u32::try_from(size_of::<SchedulerAttributes>()).unwrap_or(u32::MAX);
    let attributes = SchedulerAttributes { size, ..*attributes };
    // SAFETY: the structure has the kernel's layout and says its own size; 0 is the caller; it outlives the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

/// Chooses the CPUs. Bits beyond the present ones are ignored.
///
/// # Errors
/// `EINVAL` if none of them may be used.
pub fn set_affinity(cpus: &Mask) -> io::Result<()> {
    let len = size_of_val(cpus.0.as_slice());
    // SAFETY: the mask is as long as its length says and outlives the call; 0 is the caller.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, len, cpus.0.as_ptr()) })
}

/// Sets the priority of input and output: `class << 13 | level`.
///
/// # Errors
/// `EPERM` for the real-time class without a right to it.
pub fn set_io_priority(priority: u32) -> io::Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    // SAFETY: takes numbers; 0 is the caller.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, priority) })
}

/// Sets where memory comes from: `MPOL_*` with its flags.
///
/// # Errors
/// `EINVAL` for nodes that do not fit the mode or do not exist, `ENOSYS` without NUMA.
pub fn set_memory_policy(mode: i32, nodes: &Mask) -> io::Result<()> {
    // The kernel counts one bit more than it reads.
    let (pointer, bits) = if nodes.0.is_empty() {
        (std::ptr::null(), 0)
    } else {
        (nodes.0.as_ptr(), size_of_val(nodes.0.as_slice()) * 8 + 1)
    };
    // SAFETY: a null pointer with zero bits, or a mask as long as its length says that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, pointer, bits) })
}

/// Sets the execution domain.
///
/// # Errors
/// What the kernel says.
pub fn set_personality(persona: u32) -> io::Result<()> {
    // SAFETY: takes a number; breaks no memory of a program that runs already.
    check(unsafe { libc::syscall(libc::SYS_personality, libc::c_ulong::from(persona)) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_as_the_kernel_writes_them() {
        assert_eq!(Mask::parse("0-3,7"), Some(Mask(vec![0b1000_1111])));
        assert_eq!(Mask::parse(" 1 ,, 64"), Some(Mask(vec![2, 1])));
        assert_eq!(Mask::parse(""), Some(Mask::default()));
        let hex = |list| format!("{:#x}", Mask::parse(list).unwrap());
        assert_eq!([hex("0-3"), hex("1,64"), hex("")], ["0xf", "0x10000000000000002", "0x0"]);
        for none in ["a", "3-1", "-1", "+1", "1-", "65537", "0-99999999999999999999", "1;2"] {
            assert_eq!(Mask::parse(none), None, "{none}");
        }
    }

    #[test]
    fn this_thread_can_be_bound_to_cpus_it_has() {
        std::thread::spawn(|| {
            let all = Mask(vec![u64::MAX; 16]);
            set_affinity(&all).unwrap();
            let nowhere = set_affinity(&Mask::parse("60000").unwrap()).unwrap_err();
            assert_eq!(nowhere.raw_os_error(), Some(libc::EINVAL));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_thread_can_be_made_nicer() {
        std::thread::spawn(|| {
            set_scheduler(&SchedulerAttributes { policy: 3, nice: 5, ..SchedulerAttributes::default() })
                .unwrap();
            set_io_priority(2 << 13 | 6).unwrap();
            let wrong = SchedulerAttributes { policy: 77, ..SchedulerAttributes::default() };
            assert_eq!(set_scheduler(&wrong).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        })
        .join()
        .unwrap();
    }
}
