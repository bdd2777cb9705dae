// A program that waits to be killed.
    .globl _start
_start:
#if defined(__x86_64__)
    movl $34, %eax
    syscall
#elif defined(__aarch64__)
    mov x0, #0
    mov x1, #0
    mov x2, #0
    mov x3, #0
    mov x8, #73
    svc #0
#endif
#if defined(__x86_64__)
    jmp _start
#elif defined(__aarch64__)
    b _start
#endif
