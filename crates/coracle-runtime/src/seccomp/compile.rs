//! From a policy to instructions.
//!
//! ```text
//! load architecture
//! for each one: another → the next block, or the verdict for foreign calls
//!   load number
//!   tree of "number ≥ k?" over ranges with one verdict each
//!     leaf: return, or the argument rules of one number, then return
//! ```
//!
//! A conditional jump reaches 255 instructions; a subtree that is longer is jumped over by `JA`.

use std::collections::BTreeMap;

use coracle_sys::seccomp::{INSTRUCTIONS_MAX, Instruction};

use super::abi::{Abi, X32_BIT};
use super::invalid;
use super::profile::{
    Comparison, Condition, Policy, Profile, RET_ALLOW, RET_ERRNO, RET_LOG, RET_TRACE, Rule,
};
use crate::LaunchError;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_OR_EQUAL: u16 = 0x35;

/// Conditions of one rule: six instructions each, which a jump behind the rule must reach over.
const CONDITIONS_MAX: usize = 32;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

const ENOSYS: u32 = RET_ERRNO | 38;

/// What a range of numbers gets.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Leaf<'a> {
    Return(u32),
    /// These rules in order, then this result.
    Rules(Vec<&'a Rule>, u32),
}

pub(super) fn compile(profile: &Profile) -> Result<Vec<Instruction>, LaunchError> {
    let too_long = |rule: &&Rule| rule.conditions.len() > CONDITIONS_MAX;
    if let Some(rule) = profile.policies.iter().flat_map(|policy| &policy.rules).find(too_long) {
        return Err(invalid(format!(
            "a rule for call {} has more than {CONDITIONS_MAX} conditions",
            rule.number
        )));
    }
    let mut program = Vec::with_capacity(512);
    program.push(instruction(LOAD, ARCHITECTURE));
    let blocks = blocks(profile);
    for (idx, (arch, ranges)) in blocks.iter().enumerate() {
        let mut block = vec![instruction(LOAD, NUMBER)];
        tree(ranges, &mut block);
        program.push(Instruction { code: JUMP_EQUAL, jt: 1, jf: 0, k: *arch });
        program.push(if idx + 1 == blocks.len() {
            instruction(RETURN, profile.foreign)
        } else {
            instruction(JUMP, u32::try_from(block.len()).unwrap_or(u32::MAX))
        });
        program.append(&mut block);
    }
    if program.len() > INSTRUCTIONS_MAX {
        return Err(invalid(format!("it needs {} instructions, the kernel takes 4096", program.len())));
    }
    Ok(program)
}

type Ranges<'a> = Vec<(u32, Leaf<'a>)>;

/// Verdicts by architecture. x32 has no block of its own: it is the upper half of the numbers of `x86_64`.
fn blocks(profile: &Profile) -> Vec<(u32, Ranges<'_>)> {
    let x32 = profile.policies.iter().find(|policy| policy.abi == Abi::X32);
    profile
        .policies
        .iter()
        .filter(|policy| policy.abi != Abi::X32)
        .map(|policy| {
            let mut ranges = ranges(policy);
            if policy.abi == Abi::X86_64 {
                match x32 {
                    Some(x32) => {
                        ranges.extend(self::ranges(x32).into_iter().map(|(n, leaf)| (n | X32_BIT, leaf)));
                    }
                    None => add(&mut ranges, X32_BIT, Leaf::Return(profile.foreign)),
                }
            }
            (policy.abi.audit(), ranges)
        })
        .collect()
}

fn instruction(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

/// Verdicts by first number; each holds up to the next one.
fn ranges(policy: &Policy) -> Ranges<'_> {
    let mut by_number: BTreeMap<u32, Leaf<'_>> = BTreeMap::new();
    // Conditional rules go first, in their order; the unconditional one is what is left when none holds.
    for rule in &policy.rules {
        let leaf = by_number.entry(rule.number).or_insert(Leaf::Return(policy.default));
        match (leaf, rule.conditions.is_empty()) {
            (Leaf::Return(result) | Leaf::Rules(_, result), true) => *result = rule.result,
            (Leaf::Rules(rules, _), false) => rules.push(rule),
            (leaf @ Leaf::Return(_), false) => {
                if let Leaf::Return(result) = *leaf {
                    *leaf = Leaf::Rules(vec![rule], result);
                }
            }
        }
    }
    let beyond = match policy.highest {
        Some(_) if !is_permissive(policy.default) => ENOSYS,
        _ => policy.default,
    };
    // Where the numbers end that the profile can have known.
    let end = policy.highest.map_or(0, |highest| highest + 1);
    let rest = |number: u32| Leaf::Return(if number < end { policy.default } else { beyond });
    let mut ranges: Ranges<'_> = Vec::new();
    add(&mut ranges, 0, rest(0));
    for (number, leaf) in by_number {
        if number >= end {
            add(&mut ranges, end, rest(end));
        }
        // Rules that all end as the rest does decide nothing.
        let leaf = match leaf {
            Leaf::Rules(rules, result) if rules.iter().all(|rule| rule.result == result) => {
                Leaf::Return(result)
            }
            other => other,
        };
        add(&mut ranges, number, leaf);
        add(&mut ranges, number + 1, rest(number + 1));
    }
    add(&mut ranges, end, rest(end));
    ranges
}

/// Defaults under which a call that the profile cannot have known is let through; under the others it does not
/// exist, on which programs fall back (the rule of runc).
fn is_permissive(default: u32) -> bool {
    matches!(default & 0xffff_0000, RET_ALLOW | RET_LOG | RET_TRACE)
}

/// Appends a range, or lets it begin anew where nothing lies in between.
fn add<'a>(ranges: &mut Ranges<'a>, start: u32, leaf: Leaf<'a>) {
    if let Some((last, _)) = ranges.last() {
        if *last > start {
            return;
        }
        if *last == start {
            ranges.pop();
        }
    }
    if !matches!((ranges.last(), &leaf), (Some((_, Leaf::Return(a))), Leaf::Return(b)) if a == b) {
        ranges.push((start, leaf));
    }
}

fn tree(ranges: &[(u32, Leaf<'_>)], program: &mut Vec<Instruction>) {
    match ranges {
        [] => {}
        [(_, leaf)] => emit_leaf(leaf, program),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let first = right.first().map_or(0, |(start, _)| *start);
            let at = program.len();
            program.push(instruction(JUMP_GREATER_OR_EQUAL, first));
            tree(left, program);
            let length = program.len() - at - 1;
            match u8::try_from(length) {
                Ok(length) => set_jumps(program, at, length, 0),
                Err(_) => {
                    // Jumps inside the subtree are relative to themselves and move along.
                    set_jumps(program, at, 0, 1);
                    program.insert(at + 1, instruction(JUMP, u32::try_from(length).unwrap_or(u32::MAX)));
                }
            }
            tree(right, program);
        }
    }
}

fn set_jumps(program: &mut [Instruction], at: usize, jt: u8, jf: u8) {
    if let Some(instruction) = program.get_mut(at) {
        instruction.jt = jt;
        instruction.jf = jf;
    }
}

fn emit_leaf(leaf: &Leaf<'_>, program: &mut Vec<Instruction>) {
    let rest = match leaf {
        Leaf::Return(result) => *result,
        Leaf::Rules(rules, rest) => {
            for rule in rules {
                emit_rule(rule, program);
            }
            *rest
        }
    };
    program.push(instruction(RETURN, rest));
}

/// The conditions in turn, each jumping past the rule's `return` when it does not hold.
fn emit_rule(rule: &Rule, program: &mut Vec<Instruction>) {
    let mut blocks: Vec<Vec<Test>> = rule.conditions.iter().map(tests).collect();
    let length: usize = blocks.iter().map(Vec::len).sum();
    let mut done = 0;
    for block in &mut blocks {
        let n = block.len();
        for (idx, test) in block.iter().enumerate() {
            let place = |to: To| match to {
                To::Next => 0,
                // The end of this condition: on to the following one.
                To::Holds => n - idx - 1,
                // Behind the rule's return.
                To::Fails => length - done - idx,
            };
            let jump = |to: To| u8::try_from(place(to)).unwrap_or(u8::MAX);
            program.push(Instruction { code: test.code, jt: jump(test.yes), jf: jump(test.no), k: test.k });
        }
        done += n;
    }
    program.push(instruction(RETURN, rule.result));
}

#[derive(Clone, Copy)]
enum To {
    Next,
    Holds,
    Fails,
}

#[derive(Clone, Copy)]
struct Test {
    code: u16,
    k: u32,
    yes: To,
    no: To,
}

/// A comparison of 64 bits is made of loads and comparisons of 32 bits, high word first.
fn tests(condition: &Condition) -> Vec<Test> {
    let low = ARGUMENTS + condition.argument * 8;
    let high = low + 4;
    let load = |offset| Test { code: LOAD, k: offset, yes: To::Next, no: To::Next };
    let test = |code, k, yes, no| Test { code, k, yes, no };
    let ordered = |value: u64, low_code, above, below, last_yes, last_no| {
        vec![
            load(high),
            test(JUMP_GREATER, word(value >> 32), above, To::Next),
            test(JUMP_EQUAL, word(value >> 32), To::Next, below),
            load(low),
            test(low_code, word(value), last_yes, last_no),
        ]
    };
    match condition.comparison {
        Comparison::Equal(value) => vec![
            load(high),
            test(JUMP_EQUAL, word(value >> 32), To::Next, To::Fails),
            load(low),
            test(JUMP_EQUAL, word(value), To::Holds, To::Fails),
        ],
        Comparison::NotEqual(value) => vec![
            load(high),
            test(JUMP_EQUAL, word(value >> 32), To::Next, To::Holds),
            load(low),
            test(JUMP_EQUAL, word(value), To::Fails, To::Holds),
        ],
        Comparison::Greater(v) => ordered(v, JUMP_GREATER, To::Holds, To::Fails, To::Holds, To::Fails),
        Comparison::GreaterOrEqual(v) => {
            ordered(v, JUMP_GREATER_OR_EQUAL, To::Holds, To::Fails, To::Holds, To::Fails)
        }
        Comparison::LessOrEqual(v) => ordered(v, JUMP_GREATER, To::Fails, To::Holds, To::Fails, To::Holds),
        Comparison::Less(v) => ordered(v, JUMP_GREATER_OR_EQUAL, To::Fails, To::Holds, To::Fails, To::Holds),
        Comparison::MaskedEqual(mask, value) => {
            let and = |mask| Test { code: AND, k: mask, yes: To::Next, no: To::Next };
            vec![
                load(high),
                and(word(mask >> 32)),
                test(JUMP_EQUAL, word(value >> 32), To::Next, To::Fails),
                load(low),
                and(word(mask)),
                test(JUMP_EQUAL, word(value), To::Holds, To::Fails),
            ]
        }
    }
}

/// The low 32 bits.
fn word(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}
