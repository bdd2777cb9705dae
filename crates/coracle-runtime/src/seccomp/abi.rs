//! The ABIs by which a program may call the kernel: the native one, and those of older or narrower machines that
//! the kernel runs beside it.
//!
//! Source: `linux/audit.h`, `asm/unistd.h`; libseccomp's treatment of the multiplexers `socketcall` and `ipc`.

use super::profile::{Comparison, Condition};
#[cfg(target_arch = "aarch64")]
use super::{compat::ARM, syscalls::AARCH64};
#[cfg(target_arch = "x86_64")]
use super::{
    compat::{X32_ONLY, X86},
    syscalls::X86_64,
};

/// Calls of x32 come under the architecture of `x86_64` and with this bit.
pub(super) const X32_BIT: u32 = 0x4000_0000;
/// 32-bit ARM has a few calls of its own from here on.
const ARM_PRIVATE: u32 = 0xf_0000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Abi {
    X86_64,
    X32,
    X86,
    Aarch64,
    Arm,
}

impl Abi {
    #[cfg(target_arch = "x86_64")]
    pub(super) const NATIVE: Self = Self::X86_64;
    #[cfg(target_arch = "aarch64")]
    pub(super) const NATIVE: Self = Self::Aarch64;

    /// That of 32-bit programs on the same machine.
    #[cfg(target_arch = "x86_64")]
    pub(super) const NARROW: Self = Self::X86;
    #[cfg(target_arch = "aarch64")]
    pub(super) const NARROW: Self = Self::Arm;

    /// As profiles name it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "SCMP_ARCH_X86_64",
            Self::X32 => "SCMP_ARCH_X32",
            Self::X86 => "SCMP_ARCH_X86",
            Self::Aarch64 => "SCMP_ARCH_AARCH64",
            Self::Arm => "SCMP_ARCH_ARM",
        }
    }

    /// `AUDIT_ARCH_*`.
    pub(super) fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    pub(super) fn is_of_this_machine(self) -> bool {
        let x86 = matches!(self, Self::X86_64 | Self::X32 | Self::X86);
        x86 == cfg!(target_arch = "x86_64")
    }

    /// The number of a call, the bit of x32 left out.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn number_of(self, name: &str) -> Option<u32> {
        match self {
            Self::X86_64 => find(X86_64, name).map(u32::from),
            Self::X32 => find(X32_ONLY, name).or_else(|| find(X86_64, name).map(u32::from)),
            Self::X86 => find(X86, name),
            Self::Aarch64 | Self::Arm => None,
        }
    }

    /// The number of a call.
    #[cfg(target_arch = "aarch64")]
    pub(super) fn number_of(self, name: &str) -> Option<u32> {
        match self {
            Self::Aarch64 => find(AARCH64, name).map(u32::from),
            Self::Arm => find(ARM, name),
            Self::X86_64 | Self::X32 | Self::X86 => None,
        }
    }

    /// Numbers apart from those that grow with each kernel.
    pub(super) fn is_private(self, number: u32) -> bool {
        self == Self::Arm && number >= ARM_PRIVATE
    }

    /// A condition as it can hold: arguments of 32 bits come without upper halves.
    pub(super) fn narrowed(self, condition: Condition) -> Condition {
        if !matches!(self, Self::X86 | Self::Arm) {
            return condition;
        }
        let low = |value: u64| value & u64::from(u32::MAX);
        let comparison = match condition.comparison {
            Comparison::Equal(v) => Comparison::Equal(low(v)),
            Comparison::NotEqual(v) => Comparison::NotEqual(low(v)),
            Comparison::Less(v) => Comparison::Less(low(v)),
            Comparison::LessOrEqual(v) => Comparison::LessOrEqual(low(v)),
            Comparison::Greater(v) => Comparison::Greater(low(v)),
            Comparison::GreaterOrEqual(v) => Comparison::GreaterOrEqual(low(v)),
            Comparison::MaskedEqual(mask, v) => Comparison::MaskedEqual(low(mask), low(v)),
        };
        Condition { comparison, ..condition }
    }
}

fn find<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    let idx = table.binary_search_by(|(known, _)| (*known).cmp(name)).ok()?;
    table.get(idx).map(|(_, number)| *number)
}

/// i386's `socketcall`, by the number of the call that it stands for.
const SOCKETCALL: [&str; 20] = [
    "socket",
    "bind",
    "connect",
    "listen",
    "accept",
    "getsockname",
    "getpeername",
    "socketpair",
    "send",
    "recv",
    "sendto",
    "recvfrom",
    "shutdown",
    "setsockopt",
    "getsockopt",
    "sendmsg",
    "recvmsg",
    "accept4",
    "recvmmsg",
    "sendmmsg",
];

/// i386's `ipc`.
const IPC: [(&str, u64); 12] = [
    ("semop", 1),
    ("semget", 2),
    ("semctl", 3),
    ("semtimedop", 4),
    ("msgsnd", 11),
    ("msgrcv", 12),
    ("msgget", 13),
    ("msgctl", 14),
    ("shmat", 21),
    ("shmdt", 22),
    ("shmget", 23),
    ("shmctl", 24),
];

/// The multiplexer by which a call can be made too, and its number there. Arguments are behind a pointer then.
pub(super) fn multiplexed(abi: Abi, name: &str) -> Option<(u32, u64)> {
    if abi != Abi::X86 {
        return None;
    }
    if let Some((_, call)) =
        (1_u64..).zip(SOCKETCALL).map(|(call, known)| (known, call)).find(|(k, _)| *k == name)
    {
        return Some((102, call));
    }
    IPC.iter().find(|(known, _)| *known == name).map(|(_, call)| (117, *call))
}
